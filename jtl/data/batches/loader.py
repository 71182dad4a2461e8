"""Batches as a pure function of the step: deterministic, resumable, and sharded by process."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jtl.data.dataset import DataError

if TYPE_CHECKING:
    import grain

Plan = list[tuple[np.ndarray, int]]


@runtime_checkable
class Encoded(Protocol):
    """A split that makes batches, such as ``jtl.data.text.Texts`` or ``jtl.data.image.Images``."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Length of each example."""
        ...

    @property
    def buckets(self) -> tuple[int, ...]:
        """Default padded lengths."""
        ...

    def batch(
        self, indices: Int[np.ndarray, " B"], length: int, draws: Float[np.ndarray, "B 3"] | None
    ) -> dict[str, np.ndarray]:
        """Returns the fields of a batch."""
        ...


@runtime_checkable
class Steps(Protocol):
    """All batches of a run, by step: ``Batches``, or several as ``jtl.data.SideBySide``."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: SupportsIndex, /) -> dict[str, np.ndarray]: ...


def plan(
    lengths: Int[np.ndarray, " N"],
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    epoch: int,
    window: int = 50,
) -> Plan:
    """Plans one epoch of training: returns ``(indices, padded length)`` of each batch.

    All examples are shuffled and cut into windows of ``window`` batches; each window is sorted by length and cut into
    batches, and the batches are shuffled. So texts in a batch have similar lengths, yet batches differ between epochs.
    The padded length is the smallest bucket that fits the batch's longest text, otherwise the last. The
    ``N % batch_size`` examples that fill no batch are left out, different ones each epoch.

    Args:
        lengths: length of each example.
        batch_size: examples per batch.
        buckets: padded lengths, ascending.
        seed: of the order, together with ``epoch``.
        epoch: number of the epoch.
        window: batches that are sorted by length together.
    """
    lengths = np.asarray(lengths)
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    step = window * batch_size
    windows = [order[start : start + step] for start in range(0, len(order), step)]
    batches = [
        batch
        for part in windows
        for batch in part[np.argsort(lengths[part], kind="stable")].reshape(-1, batch_size)
    ]
    return [(batches[i], _bucket(lengths[batches[i]], buckets)) for i in rng.permutation(len(batches))]


def evaluation_plan(lengths: Int[np.ndarray, " N"], batch_size: int, buckets: Sequence[int]) -> Plan:
    """Plans one pass over every example, sorted by length; the last batch is padded with index -1."""
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [
        (np.pad(batch, (0, batch_size - len(batch)), constant_values=-1), _bucket(lengths[batch], buckets))
        for batch in batches
    ]


def _bucket(lengths: np.ndarray, buckets: Sequence[int]) -> int:
    return next((bucket for bucket in buckets if bucket >= lengths.max()), buckets[-1])


def padding_waste(lengths: Int[np.ndarray, " N"], batches: Plan) -> float:
    """Returns computed tokens over real tokens of a plan; 1 means no padding."""
    computed = sum(len(indices) * length for indices, length in batches)
    real = sum(int(np.asarray(lengths)[indices[indices >= 0]].sum()) for indices, _ in batches)
    return computed / real


@dataclass(frozen=True)
class Batches:
    """All batches of a run: ``batches[step]`` depends only on the attributes and ``step``.

    A batch has the split's fields (``input_ids``, ``attention_mask`` int32 ``(B, L)``, or ``image`` float32
    ``(B, H, W, C)``; ``label`` int32 ``(B,)``), ``weight`` float32 ``(B,)``, 0 for padding rows, and ``index`` int32
    ``(B,)``, the example's position in the split, -1 where the weight is 0. B is this process's share of the rows.

    Raises:
        DataError: no batch can be cut, a text exceeds the last bucket, the processes cannot share a batch evenly, or
            both ``steps`` and ``epochs`` are given.

    Attributes:
        split: the examples.
        batch_size: rows of a global batch, over all processes.
        train: if True, shuffled, augmented and without the remainder; otherwise every example once, ordered by length.
        seed: of the order and the augmentation.
        epochs: number of passes over the split.
        steps: number of batches, in place of ``epochs``: as many epochs as needed, the last cut short.
        buckets: padded lengths; by default the split's own.
        process_index: index of this process.
        process_count: number of processes that share each global batch.
    """

    split: Encoded
    batch_size: int
    train: bool = True
    seed: int = 0
    epochs: int = 1
    steps: int | None = None
    buckets: tuple[int, ...] | None = None
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        count, longest = len(self.split), int(self.split.lengths.max(initial=0))
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise DataError(
                f"batch size {self.batch_size} is no positive multiple of {self.process_count} processes"
            )
        if self.steps is not None and self.epochs != 1:
            raise DataError(f"steps={self.steps} and epochs={self.epochs}: give one of them")
        if not 0 <= self.process_index < self.process_count:
            raise DataError(f"process {self.process_index} of {self.process_count}: out of range")
        if self.train and count < self.batch_size:
            raise DataError(
                f"{count} training examples fill no batch of {self.batch_size}; choose at most {count}"
            )
        if not count:
            raise DataError("cannot cut batches from an empty split")
        if longest > self.lengths[-1]:
            raise DataError(
                f"a text has {longest} tokens, the longest bucket {self.lengths[-1]}; tokenise with max_length="
                f"{self.lengths[-1]}, which keeps the closing special tokens"
            )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Padded lengths that may occur, ascending: the static shapes."""
        return tuple(sorted(self.buckets or self.split.buckets))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (1 if rest and not self.train else 0)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs if self.steps is None else self.steps

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[step] for step in range(len(self)))

    @cached_property
    def _plan(self) -> Any:
        if not self.train:
            return lru_cache(1)(lambda _: evaluation_plan(self.split.lengths, self.batch_size, self.lengths))
        # Threads that read ahead may be in two epochs at once.
        return lru_cache(2)(
            lambda epoch: plan(self.split.lengths, self.batch_size, self.lengths, self.seed, epoch)
        )

    def __getitem__(self, step: SupportsIndex, /) -> dict[str, np.ndarray]:
        step = operator.index(step)
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, place = divmod(step, self.steps_per_epoch)
        indices, length = self._plan(epoch if self.train else 0)[place]
        share = self.batch_size // self.process_count
        mine = slice(self.process_index * share, (self.process_index + 1) * share)
        # Drawn for the whole global batch, so that the number of processes changes nothing.
        draws = (
            np.random.default_rng((self.seed, epoch, place)).random((self.batch_size, 3))
            if self.train
            else None
        )
        rows = indices[mine]
        batch = self.split.batch(np.maximum(rows, 0), length, None if draws is None else draws[mine])
        return batch | {"weight": (rows >= 0).astype(np.float32), "index": rows.astype(np.int32)}


def loader(batches: Steps, threads: int = 2, ahead: int = 8) -> grain.IterDataset:
    """Returns a grain dataset that reads ``batches`` ahead in threads.

    With ``iterator = iter(loader(batches))``, ``iterator.get_state()`` is a small JSON-serialisable dict, and
    ``set_state`` with it, even in another process, continues with exactly the next batch.

    Args:
        batches: such as ``Batches``.
        threads: number of reading threads.
        ahead: number of batches to read ahead.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
    return grain.MapDataset.source(batches).to_iter_dataset(options)
