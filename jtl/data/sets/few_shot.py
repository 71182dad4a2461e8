"""Data sets for few-shot learning, whose splits hold different classes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import SPLITS, DataError, Dataset, Example, Source, Subset, labels, split_classes
from jtl.data.readers.labels import own as labels_of
from jtl.data.sets.newsgroups import Relabelled

GLYPHS = "glyphs"
SHARES = {"validation": 0.16, "test": 0.2}  # of the classes, as in miniImageNet
# Classes of a split by the start of their names; test has the others. As in Bao et al. 2020,
# https://arxiv.org/abs/1908.06039.
TOPICS = {"newsgroups20": {"train": ("rec.", "sci."), "validation": ("comp.",)}}


def new_classes(dataset: Dataset, seed: int = 0) -> Dataset:
    """Returns ``dataset`` with its examples pooled and each class in one split only.

    The classes of ``newsgroups20`` are split by topic. If no class of the test split is in train or validation, as in
    ``tfds:omniglot``, the test split is kept and 16 % of the other classes become validation. Otherwise 20 % of all
    classes become test and 16 % validation.

    Args:
        dataset: any data set with labels of ``jtl.data.load``.
        seed: decides which classes go where.

    Raises:
        DataError: there are too few classes to split.
    """
    own = {split: set(np.unique(labels(source)).tolist()) for split, source in dataset.splits.items()}
    everything = Joined(tuple(dataset.splits.values()))
    if dataset.name in TOPICS:
        chosen = _by_topic(dataset.classes, TOPICS[dataset.name])
        note = "classes split by topic"
    elif own["test"].isdisjoint(own["train"] | own["validation"]):
        chosen = {
            **_cut(own["train"] | own["validation"], ("validation",), seed),
            "test": sorted(own["test"]),
        }
        note = f"classes of validation cut from train by seed {seed}"
    else:
        chosen = _cut(set.union(*own.values()), ("validation", "test"), seed)
        note = f"classes split by seed {seed}"
    return replace(
        dataset, splits=_parts(everything, chosen), version=f"{dataset.version}:{note}", notes=(note,)
    )


@dataclass(frozen=True, eq=False)
class Joined:
    """The examples of ``sources``, one source after another."""

    sources: Sequence[Source]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        ends = list(accumulate(map(len, self.sources)))
        which = bisect_right(ends, int(index))
        return self.sources[which][int(index) - (ends[which - 1] if which else 0)]

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of every example."""
        return np.concatenate([labels(source) for source in self.sources])


def _parts(source: Source, chosen: Mapping[str, Sequence[int]]) -> dict[str, Source]:
    label = labels(source)
    return {split: Subset(source, np.flatnonzero(np.isin(label, chosen[split]))) for split in SPLITS}


def _cut(classes: set[int], splits: Sequence[str], seed: int) -> dict[str, list[int]]:
    shares = {split: max(1, round(SHARES[split] * len(classes))) for split in splits}
    return split_classes(classes, {"train": len(classes) - sum(shares.values()), **shares}, seed)


def _by_topic(classes: Sequence[str], starts: Mapping[str, tuple[str, ...]]) -> dict[str, list[int]]:
    of = [next((split for split in starts if name.startswith(starts[split])), "test") for name in classes]
    return {split: [i for i, own in enumerate(of) if own == split] for split in SPLITS}


def folders(name: str, folder: Path, seed: int = 0) -> Dataset:
    """Loads images from a folder with ``train/CLASS/`` and ``test/CLASS/``, whose classes differ.

    Args:
        name: of the data set.
        folder: the folder, optionally with ``validation/CLASS/`` too.
        seed: decides which classes of train become validation, if there is no folder for it.

    Raises:
        DataError: two splits share a class, or there are too few classes to cut validation from.
    """
    there = [split for split in SPLITS if (folder / split).is_dir()]
    parts = {split: labels_of(folder / split) for split in there}
    classes: tuple[str, ...] = ()
    splits: dict[str, Source] = {}
    for split, part in parts.items():
        if both := sorted(set(classes) & set(part.classes)):
            raise DataError(
                f"{folder}: {split} shares the classes {both[:5]} with another split; a few-shot result on classes "
                "that were trained on means nothing"
            )
        source = Joined(tuple(part.splits.values()))
        splits[split] = Relabelled(source, np.arange(len(source)), source.labels + len(classes))
        classes += part.classes
    if "validation" not in splits:
        own = set(range(len(parts["train"].classes)))
        train = splits["train"]
        splits |= {
            split: Subset(train, np.flatnonzero(np.isin(labels(train), part)))
            for split, part in _cut(own, ("validation",), seed).items()
        }
    first = parts["train"]
    return replace(
        first,
        name=name,
        splits={split: splits[split] for split in SPLITS},
        classes=classes,
        origin=f"your files at {folder}",
        version=" ".join(part.version for part in parts.values()),
        notes=(),
    )
