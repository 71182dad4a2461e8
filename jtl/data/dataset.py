"""The data set type that the rest of jtl works with, and deterministic ways to split and subsample one."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from jtl.errors import InputError

SPLITS = ("train", "validation", "test")

Example = Mapping[str, Any]


class DataError(InputError):
    """Data that cannot be trained on; the message says what is wrong, where, and what to do."""


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    An example is a dict with ``"text"`` (str) or ``"image"`` (uint8 ``(H, W, C)``, C 1 or 3), ``"label"`` (int) and any
    further fields that its data set documents.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: its splits, classes and provenance.

    Attributes:
        name: the name it was loaded by.
        kind: what its examples hold: ``"text"`` or ``"image"`` with a label (or boxes or masks), ``"question"``,
            ``"summary"`` or ``"speech"``; see the modules of ``jtl.data.readers``.
        splits: ``train``, ``validation`` and ``test``.
        classes: name of each label, in label order; empty if there are no labels.
        origin: where it comes from, and its licence if known.
        version: identity of the exact content, for cache keys.
        notes: changes that a reader of results should know about, such as splits cut from train or repeated texts.
    """

    name: str
    kind: Literal["text", "image", "question", "summary", "speech"]
    splits: Mapping[str, Source]
    classes: tuple[str, ...]
    origin: str
    version: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(f"{split} {len(source)}" for split, source in self.splits.items())
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return "\n  ".join([f"{self.name} ({self.kind}{classes}; {sizes}); {self.origin}", *self.notes])


@dataclass(frozen=True, eq=False)
class Subset:
    """The examples of ``source`` at ``indices``, in that order."""

    source: Source
    indices: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return self.source[int(self.indices[index])]


def labels(source: Source) -> Int[np.ndarray, " N"]:
    """Returns the label of every example; reads all examples unless the source has ``labels``."""
    if isinstance(source, Subset):
        return labels(source.source)[source.indices]
    known = getattr(source, "labels", None)
    return np.fromiter((source[i]["label"] for i in range(len(source))), np.int32) if known is None else known


def subset(source: Source, n: int, seed: int) -> Subset:
    """Returns ``n`` examples of ``source`` as a stratified, nested sample; see ``subset_indices``."""
    return Subset(source, subset_indices(labels(source), n, seed))


def subset_indices(label: Int[np.ndarray, " N"], n: int, seed: int) -> Int[np.ndarray, " n"]:
    """Returns the indices of a stratified sample, decided by ``seed``.

    Samples are nested: those of size 64 are the first 64 of those of size 256. They start with one example per class
    and then keep the class proportions.

    Args:
        label: label of each example.
        n: size of the sample.
        seed: of the sample.

    Raises:
        DataError: ``n`` is below the number of classes or above the number of examples.
    """
    label = np.asarray(label)
    classes, counts = np.unique(label, return_counts=True)
    if not len(classes) <= n <= len(label):
        raise DataError(
            f"cannot draw {n} examples out of {len(label)} of {len(classes)} classes: "
            f"ask for {len(classes)} to {len(label)}"
        )
    order = np.random.default_rng(seed).permutation(len(label))
    place = np.empty(len(label))
    for one, count in zip(classes, counts, strict=True):
        members = order[label[order] == one]
        place[members] = (np.arange(count) + 0.5) / count
        place[members[0]] = 0.0
    return order[np.argsort(place[order], kind="stable")][:n]


def stable_hash(key: str | bytes) -> int:
    """Returns a 64-bit number that depends only on ``key``, not on the process or machine.

    >>> stable_hash("spirited_away") % 100
    13
    """
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def carve(
    keys: Sequence[str | bytes], fraction: float, strata: Sequence[Any] | np.ndarray | None = None
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " K"]]:
    """Splits rows in two by the hash of their keys.

    Within each stratum the ``fraction`` of keys with the smallest hashes is carved out, at least one if there are two.
    Rows with equal keys stay together (in the stratum of the first), so no text lands in both parts.

    Args:
        keys: one per row, such as its text or image bytes.
        fraction: share of the keys to carve out.
        strata: one per row, such as its label; None for a single stratum.

    Returns:
        The indices of the remaining rows, and those of the carved rows.
    """
    first: dict[str | bytes, Any] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, None if strata is None else strata[index])
    groups = defaultdict(list)
    for key, stratum in first.items():
        groups[stratum].append(key)
    carved: set[str | bytes] = set()
    for group in groups.values():
        count = max(round(fraction * len(group)), 1 if len(group) > 1 else 0)
        carved.update(sorted(group, key=stable_hash)[:count])
    inside = np.fromiter((key in carved for key in keys), bool, len(keys))
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def complete(
    splits: Mapping[str, Source],
    keys: Sequence[str],
    strata: Sequence[int] | np.ndarray | None = None,
    limit: int | None = None,
) -> tuple[dict[str, Source], list[str]]:
    """Adds missing splits: test takes a fifth of train, then validation a tenth of what is left.

    Args:
        splits: the given splits, ``train`` among them.
        keys: one per example of train; splits are cut by their hash.
        strata: one per example of train, such as its label; each is cut alike.
        limit: approximate maximum size of a cut split.

    Returns:
        All splits, and a note on each cut.

    Raises:
        DataError: train is too small to cut.
    """
    splits, notes, train = dict(splits), [], splits["train"]
    left = list(range(len(train)))
    for split, fraction in (("test", 0.2), ("validation", 0.1)):
        if split in splits:
            continue
        share = fraction if limit is None else min(fraction, limit / len(left))
        rest, carved = carve(
            [keys[i] for i in left], share, None if strata is None else [strata[i] for i in left]
        )
        if not len(carved):
            raise DataError(
                f"train has {len(left)} examples: too few to cut a {split} split; add examples or a file"
            )
        notes.append(
            f"no {split} split: {len(carved)} of {len(left)} examples of train became it, chosen by hash"
        )
        splits[split] = Subset(train, np.array([left[i] for i in carved]))
        left = [left[i] for i in rest]
        splits["train"] = Subset(train, np.array(left))
    return {split: splits[split] for split in SPLITS}, notes


def check_labels(label: Sequence[int] | np.ndarray, classes: Sequence[str], split: str, where: str) -> None:
    """Checks that labels lie in ``range(len(classes))`` and, in train, that every class has an example.

    Raises:
        DataError: a label is out of range, the split is empty, or a class has no example in train.
    """
    counts = Counter(int(one) for one in label)
    if not counts:
        raise DataError(f"{where}: split {split} is empty; give it rows or leave it out")
    if wrong := sorted(one for one in counts if not 0 <= one < len(classes)):
        row = next(i for i, one in enumerate(label) if int(one) == wrong[0])
        raise DataError(
            f"{where}: split {split} has label {wrong[0]} (example {row}) out of range: the {len(classes)} classes "
            f"of train are labelled 0 to {len(classes) - 1}"
        )
    if split == "train" and (empty := [name for i, name in enumerate(classes) if i not in counts]):
        raise DataError(
            f"{where}: train has no example of class {empty[0]!r}"
            + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
            + "; add some, or number the classes from 0 without gaps"
        )


ALIASES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
            "val": "validation", "dev": "validation", "test": "test"}  # fmt: skip


def by_split(path: Path, entries: Sequence[Path]) -> dict[str, Path]:
    """Returns the files or folders in ``path`` by the split each is named after.

    Raises:
        DataError: a name is not a split's, two name the same split, or there is no train.
    """
    splits: dict[str, Path] = {}
    for entry in entries:
        name = entry.stem if entry.is_file() else entry.name
        if name not in ALIASES:
            raise DataError(
                f"{entry}: expected the name of a split ({', '.join(ALIASES)}); name one file directly"
            )
        if (split := ALIASES[name]) in splits:
            raise DataError(f"{path}: {splits[split].name} and {entry.name} are both split {split}; keep one")
        splits[split] = entry
    if splits and "train" not in splits:
        raise DataError(f"{path}: no train split beside {', '.join(entry.name for entry in splits.values())}")
    return splits


def digest(files: Iterable[Path]) -> str:
    """Returns a hash of the content of ``files``, in this order."""
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()[:16]


VOID = 255  # a pixel of no class, ignored by losses and metrics


def split_classes(classes: Iterable[int], shares: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """Partitions ``classes`` at random into parts of the sizes ``shares``, decided by ``seed``.

    Raises:
        DataError: there are too few classes.

    >>> split_classes(range(5), {"train": 3, "test": 2}, seed=0)
    {'train': [2, 3, 4], 'test': [0, 1]}
    """
    known = sorted(set(classes))
    if sum(shares.values()) > len(known) or min(shares.values()) < 1:
        raise DataError(f"cannot split {len(known)} classes into {dict(shares)}")
    order, parts, start = np.random.default_rng(seed).permutation(known), {}, 0
    for name, size in shares.items():
        parts[name] = sorted(order[start : start + size].tolist())
        start += size
    return parts
