"""Batches that combine rows of several domains, for domain adaptation and generalisation."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from jtl.data.batches.loader import Batches
from jtl.data.dataset import DataError


@dataclass(frozen=True)
class SideBySide:
    """Batches of several splits concatenated: ``mixed[step]`` holds the rows of one batch of every part.

    A batch has the parts' fields and ``domain`` int32 ``(B,)``, the number of the part each row comes from, as read by
    ``jtl.domain`` (source first). ``index`` is the example's position in its own split. Texts are padded to the longest
    part. Like ``Batches`` it depends only on its attributes and ``step``, so ``jtl.data.loader.loader`` can read and
    resume it.

    Its length is that of the longest part. A shorter part starts again in the same order: give it enough epochs to be
    as long, so that each pass has a new order. If parts hold the same examples in the same order (MNIST and MNIST-M),
    give them different seeds: otherwise each batch holds pairs, which tell a loss more than domains do.

    Raises:
        DataError: there is no part; or, when read, parts differ in their fields, in a shape (other than the length of
            texts) or in the padding token.

    Attributes:
        parts: the batches of each domain, each with its own batch size.
        hide_labels: set ``label`` to -1 in all parts but the first, so that no loss learns from a target label by
            accident. False for domain generalisation, where every domain is labelled.
    """

    parts: Sequence[Batches]
    hide_labels: bool = True

    def __post_init__(self):
        if not self.parts:
            raise DataError("no parts to mix; give the batches of each domain")

    def __len__(self) -> int:
        return max(map(len, self.parts))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: SupportsIndex, /) -> dict[str, np.ndarray]:
        step = operator.index(step)
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        batches = [part[step % len(part)] for part in self.parts]
        fields = [sorted(batch) for batch in batches]
        if any(names != fields[0] for names in fields):
            raise DataError(f"parts have the fields {' and '.join(map(str, fields))}; mix parts of one kind")
        if self.hide_labels:
            batches[1:] = [
                batch | {"label": np.full_like(batch["label"], -1)} if "label" in batch else batch
                for batch in batches[1:]
            ]
        sizes = [len(batch["weight"]) for batch in batches]
        mixed = {name: self._join(name, [batch[name] for batch in batches]) for name in batches[0]}
        return mixed | {"domain": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)}

    def _join(self, name: str, arrays: list[np.ndarray]) -> np.ndarray:
        if name in ("input_ids", "attention_mask"):
            fill = self._pad_id() if name == "input_ids" else 0
            longest = max(array.shape[1] for array in arrays)
            arrays = [
                np.pad(array, ((0, 0), (0, longest - array.shape[1])), constant_values=fill)
                for array in arrays
            ]
        if len({array.shape[1:] for array in arrays}) > 1:
            shapes = " and ".join(str(array.shape[1:]) for array in arrays)
            raise DataError(f"rows of {name!r} have the shapes {shapes}; prepare every part alike")
        return np.concatenate(arrays)

    def _pad_id(self) -> int:
        splits: list[Any] = [part.split for part in self.parts]
        found = {split.pad_id for split in splits}
        if len(found) > 1:
            raise DataError(f"parts pad with the tokens {sorted(found)}; encode them with one tokenizer")
        return found.pop()
