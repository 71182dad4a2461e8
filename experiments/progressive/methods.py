"""The methods of ``experiments.progressive``: what each trains for a new task, and which model answers which task.

A method is a class. ``learn(task)`` yields what is to be trained, one ``Recipe`` after another, and is sent the trained
model; ``view(task)`` is the model that answers a task. ``KNOWN`` methods have leaves of each task's own, so they must
be told at test time which task a row is of. The others have one head where the tasks share their classes, and else a
head for each task, which all methods are told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from experiments.progressive.columns import Lora, Progressive, ProgressiveLinear, ProgressiveRandom, Separate
from experiments.progressive.single_network import Agem, Ewc, Full, Head, Joint, Lwf, PackNet, Replay, Si
from experiments.progressive.trial import Trial

Method = Literal[
    "separate", "progressive", "progressive_linear", "progressive_random", "head", "full", "joint", "ewc", "si", "lwf",
    "agem", "replay", "packnet", "lora",
]  # fmt: skip
METHODS: dict[Method, Callable[[Trial], Any]] = {
    "separate": Separate, "progressive": Progressive, "progressive_linear": ProgressiveLinear,
    "progressive_random": ProgressiveRandom, "head": Head, "full": Full, "joint": Joint, "ewc": Ewc, "si": Si,
    "lwf": Lwf, "agem": Agem, "replay": Replay, "packnet": PackNet, "lora": Lora,
}  # fmt: skip
