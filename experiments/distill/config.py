"""Settings of the distillation study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from experiments.common.settings import Config, at_least
from experiments.distill.methods import Method

Name = Literal[
    "text", "text_few", "text_1_layer", "newsgroups", "newsgroups_1_layer", "image", "born_again"
]  # fmt: skip


class Pair(NamedTuple):
    """A teacher, its student, and how many labelled examples the student sees; 0 for all."""

    model: str
    data: str
    student: str
    labels: int = 0


SETTINGS: dict[str, Pair] = {
    "text": Pair("minilm", "rotten_tomatoes", "layers_3"),
    "text_few": Pair("minilm", "rotten_tomatoes", "layers_3", 256),
    "text_1_layer": Pair("minilm", "rotten_tomatoes", "layers_1"),
    "newsgroups": Pair("minilm", "newsgroups20", "layers_3"),
    "newsgroups_1_layer": Pair("minilm", "newsgroups20", "layers_1"),
    "image": Pair("efficientnet-lite0", "mnist5k", "conv4", 256),
    "born_again": Pair("minilm", "rotten_tomatoes", "same"),
}


@dataclass(frozen=True, kw_only=True)
class Distillation(Config):
    """Settings of the comparison."""

    setting: tuple[Name, ...] = ("text",)
    """Which teachers and students to compare."""
    model: str | None = None
    """Your own teacher instead, with --data and --student; see experiments.finetune."""
    data: str | None = None
    """Your own data; see experiments.finetune --data."""
    student: str | None = None
    """Your own student: layers_K (the teacher's, K of them), conv4 for images, or same."""
    method: tuple[Method | Literal["all"], ...] = ("all",)
    """Which to compare; student_alone always runs."""
    teacher_steps: int = at_least(1, 300)
    """Updates of the teacher, 32 examples each, on all training examples."""
    steps: int = at_least(1, 150)
    """Updates of every student on texts."""
    image_steps: int = at_least(1, 300)
    """Updates of every student on images."""
    batch_size: int = at_least(1, 32)
    """Examples of an update."""
    labels: int | None = at_least(0, None)
    """Labelled training examples of the students; left out, those of the setting; 0 takes all."""
    max_length: int = at_least(1, 48)
    """Longest text in tokens; the rest is cut off."""
    image_size: int = at_least(1, 64)
    """Side of the images in pixels."""
    test_examples: int = at_least(0, 2000)
    """Test examples; 0 takes all."""
    seeds: int = at_least(1, 3)
    """Repetitions: other teachers, starts and orders."""
