"""Settings of the comparison of continual learning methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.common.settings import Config
from experiments.progressive import methods as methods

Name = Literal["permuted_mnist", "split_mnist", "rotated_mnist", "digits", "newsgroups"]
POINTS = 10  # validations in the training of a task


@dataclass(frozen=True, kw_only=True)
class Progressive(Config):
    """Settings of the comparison."""

    sequence: tuple[Name, ...] = ("permuted_mnist", "split_mnist", "rotated_mnist", "digits", "newsgroups")
    """Which sequences to learn."""
    data: tuple[str, ...] = ()
    """Image data sets of your own instead, a task each; see experiments.finetune --data."""
    method: tuple[methods.Name | Literal["all"], ...] = ("all",)
    """Which to compare; separate always runs."""
    tasks: int = 10
    """Tasks of a sequence at most."""
    steps: int = 400
    """Updates for each task."""
    batch_size: int = 32
    """Examples in an update."""
    learning_rate: float = 1e-3
    """Rate of Adam."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the network on images."""
    ewc_strength: float = 30.0
    """λ of EWC; wider networks take more."""
    train_examples: int = 0
    """Training examples of each task; 0 takes all."""
    seeds: int = 3
    """Repetitions."""
