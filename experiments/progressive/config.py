"""Settings of the comparison of continual learning methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.common.settings import Config, above, at_least
from experiments.progressive.methods import Method

Name = Literal["permuted_mnist", "split_mnist", "rotated_mnist", "digits", "newsgroups"]
POINTS = 10  # validations in the training of a task


@dataclass(frozen=True, kw_only=True)
class Progressive(Config):
    """Settings of the comparison."""

    sequence: tuple[Name, ...] = ("permuted_mnist", "split_mnist", "rotated_mnist", "digits", "newsgroups")
    """Which sequences to learn."""
    data: tuple[str, ...] = ()
    """Image data sets of your own instead, a task each; see experiments.finetune --data."""
    method: tuple[Method | Literal["all"], ...] = ("all",)
    """Which to compare; separate always runs."""
    tasks: int = at_least(2, 10)
    """Tasks of a sequence at most."""
    steps: int = at_least(POINTS, 400)
    """Updates for each task."""
    batch_size: int = at_least(1, 32)
    """Examples in an update."""
    learning_rate: float = above(0, 1e-3)
    """Rate of Adam."""
    hidden: tuple[int, ...] = at_least(1, (256, 256))
    """Widths of the network on images."""
    ewc_strength: float = at_least(0, 30.0)
    """λ of EWC; wider networks take more."""
    train_examples: int = at_least(0, 0)
    """Training examples of each task; 0 takes all."""
    seeds: int = at_least(1, 3)
    """Repetitions."""
