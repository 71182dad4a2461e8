"""Six transfer tasks from 20 Newsgroups, for domain adaptation: source and target hold different subgroups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import DataError, Dataset, Example, Source, labels
from jtl.tree import near_misses

PREFIX = "newsgroups20:"
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "comp_rec": {
        "source": ("comp.graphics", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "rec.motorcycles",
                   "rec.sport.hockey"),
        "target": ("comp.os.ms-windows.misc", "comp.windows.x", "rec.autos", "rec.sport.baseball"),
    },
    "comp_sci": {
        "source": ("comp.graphics", "comp.os.ms-windows.misc", "sci.crypt", "sci.electronics"),
        "target": ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "comp.windows.x", "sci.med", "sci.space"),
    },
    "comp_talk": {
        "source": ("comp.graphics", "comp.sys.mac.hardware", "comp.windows.x", "talk.politics.mideast",
                   "talk.religion.misc"),
        "target": ("comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "talk.politics.guns",
                   "talk.politics.misc"),
    },
    "rec_sci": {
        "source": ("rec.autos", "rec.sport.baseball", "sci.med", "sci.space"),
        "target": ("rec.motorcycles", "rec.sport.hockey", "sci.crypt", "sci.electronics"),
    },
    "rec_talk": {
        "source": ("rec.autos", "rec.motorcycles", "talk.politics.guns", "talk.politics.misc"),
        "target": ("rec.sport.baseball", "rec.sport.hockey", "talk.politics.mideast", "talk.religion.misc"),
    },
    "sci_talk": {
        "source": ("sci.electronics", "sci.med", "talk.politics.misc", "talk.religion.misc"),
        "target": ("sci.crypt", "sci.space", "talk.politics.guns", "talk.politics.mideast"),
    },
}  # fmt: skip
TASKS = tuple(f"{PREFIX}{task}:{domain}" for task in GROUPS for domain in ("source", "target"))


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The examples of ``source`` at ``indices``, in that order, with new ``labels``."""

    source: Source
    indices: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return {**self.source[int(self.indices[index])], "label": int(self.labels[index])}


@cache
def _whole() -> tuple[Dataset, dict[str, Int[np.ndarray, " N"]]]:
    """All newsgroups and the group of each example, which takes seconds to read: all tasks share it."""
    from jtl.data.sets import builders

    whole = builders.embedded("newsgroups20")
    return whole, {split: labels(source) for split, source in whole.splits.items()}


def transfer(name: str) -> Dataset:
    """Loads one domain of a transfer task, such as ``"newsgroups20:comp_sci:target"``.

    The tasks are those of Dai, Xue, Yang & Yu 2007, "Co-clustering based classification for out-of-domain documents",
    KDD: two top-level categories are to be distinguished, and source and target come from different subgroups of both.
    Labels are 0 for the first category in the name and 1 for the second.

    Splits are those of ``newsgroups20``, filtered, so test is later than train. The paper uses every post of a
    subgroup, with none held out, so results on one split are not comparable with its own.

    Raises:
        DataError: the task or domain is unknown (close matches are listed).
    """
    if name not in TASKS:
        close = " or ".join(near_misses(name, TASKS))
        raise DataError(
            f"unknown transfer task {name!r}{f' (did you mean {close}?)' if close else ''}; they are "
            f"{PREFIX}TASK:DOMAIN with TASK one of {', '.join(GROUPS)}, and DOMAIN source or target"
        )
    whole, groups_of = _whole()
    _, task, domain = name.split(":")
    classes, groups = tuple(task.split("_")), GROUPS[task][domain]
    # New label of each newsgroup; -1 for those outside the task or in the other domain.
    binary = np.array(
        [classes.index(g.split(".")[0]) if g in groups else -1 for g in whole.classes], np.int32
    )
    splits = {}
    for split, source in whole.splits.items():
        label = binary[groups_of[split]]
        kept = np.flatnonzero(label >= 0)
        splits[split] = Relabelled(source, kept, label[kept])
    return Dataset(
        name=name,
        kind="text",
        splits=splits,
        classes=classes,
        origin=f"{whole.origin}; task of Dai et al. 2007",
        version=f"{whole.version}:{task}:{domain}",
        notes=(f"subgroups: {', '.join(groups)}",),
    )
