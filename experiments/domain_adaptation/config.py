"""Settings of the comparison of domain adaptation methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.common.settings import Config, above, at_least
from experiments.domain_adaptation.methods import Method

NEWSGROUPS = ("comp_rec", "comp_sci", "comp_talk", "rec_sci", "rec_talk", "sci_talk")
PAIRS: dict[str, list[tuple[str, str]]] = {
    "mnist_m": [("mnist5k", "mnist_m")],
    "mnist_uci": [("mnist5k", "uci_digits")],
    "uci_mnist": [("uci_digits", "mnist5k")],
    "rendered_mnist": [("rendered_digits", "mnist5k")],
    "newsgroups": [(f"newsgroups20:{name}:source", f"newsgroups20:{name}:target") for name in NEWSGROUPS],
}
Name = Literal["mnist_m", "mnist_uci", "uci_mnist", "rendered_mnist", "newsgroups"]


@dataclass(frozen=True, kw_only=True)
class DomainAdaptation(Config):
    """Settings of the comparison."""

    task: tuple[Name, ...] = ("mnist_m",)
    """Which transfers to run."""
    source: str | None = None
    """Your own source instead, with --target; see experiments.finetune --data."""
    target: str | None = None
    """Your own target: a data set of the same classes."""
    method: tuple[Method | Literal["all"], ...] = ("all",)
    """Which to compare; source_only and target_trained always run."""
    model: str | None = None
    """Left out: conv4 for images, minilm for texts; see experiments.finetune."""
    frozen: bool = False
    """Train a network of one hidden layer on the model's frozen features. Always so for texts without --model."""
    steps: int | None = at_least(1, None)
    """Updates of every method; left out, 1000 for conv4, 300 on frozen features, 150 for whole pretrained models."""
    batch_size: int = at_least(2, 32)
    """Examples of each domain in an update, two or more: a covariance needs them."""
    learning_rate: float | None = above(0, None)
    """Peak rate of AdamW; left out, 2e-3 for conv4, 1e-3 on frozen features, 1e-4 for whole pretrained models."""
    max_length: int = at_least(1, 64)
    """Longest text in tokens; the rest is cut off."""
    validations: int = at_least(1, 10)
    """Points of the run that a rule can choose from."""
    test_examples: int = at_least(0, 1000)
    """Test examples of the target; 0 takes all."""
    seeds: int = at_least(1, 5)
    """Repetitions."""
