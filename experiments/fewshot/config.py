"""Settings of the few-shot comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.common.settings import Config, above, at_least
from experiments.fewshot.episodes import Adapt
from experiments.fewshot.methods import Algorithm
from jtl.meta.normalise import Normalise

BLOCK = 50


@dataclass(frozen=True, kw_only=True)
class FewShot(Config):
    """Settings of the comparison."""

    data: str = "glyphs"
    """glyphs, newsgroups20, a folder of images or tfds:NAME; see jtl.data.load_classes."""
    backbone: str = "conv4"
    """conv4 or resnet12, from scratch; or a pretrained model, such as minilm or efficientnet-lite0."""
    adapt: Adapt | None = None
    """What trains of a pretrained backbone: head (a small network on frozen features, the default), lora or all."""
    algorithm: tuple[Algorithm | Literal["all"], ...] = ("all",)
    """Which to compare; all is those named in this help."""
    ways: tuple[int, ...] = at_least(2, (5, 5, 20))
    """N of each setting."""
    shots: tuple[int, ...] = at_least(1, (1, 5, 1))
    """K of each setting, as many as --ways."""
    normalise: Normalise = "transductive"
    """Statistics of batch normalisation."""
    updates: int = at_least(1, 3000)
    """Updates of meta-training, and of training on all classes."""
    tasks: int = at_least(1, 8)
    """Tasks of an update of the gradient methods."""
    metric_tasks: int = at_least(1, 2)
    """Tasks of an update of the metric learners, which have more ways."""
    metric_ways: int = at_least(2, 20)
    """Ways of the tasks that metric learners train on; fewer if there are fewer training classes."""
    queries: int = at_least(1, 5)
    """Query examples a class in training."""
    inner_steps: int = at_least(1, 1)
    """Inner steps in training."""
    test_steps: int = at_least(1, 5)
    """Inner steps in testing."""
    inner_rate: float | None = above(0, None)
    """Rate of the inner steps; left out, the algorithm's own."""
    learning_rate: float = above(0, 3e-3)
    """Highest outer rate of Adam; Reptile takes steps from 1 towards 0."""
    turns: bool = True
    """Turn each class of a training task by some quarters of a circle, which makes four classes of each, as the papers
    do for Omniglot. Images alone."""
    width: int = at_least(1, 32)
    """Filters of conv4."""
    image_size: int = at_least(1, 28)
    """Side of the images that conv4 and resnet12 see; under 40, conv4 takes strides in place of pooling."""
    max_length: int = at_least(1, 64)
    """Longest text in tokens."""
    test_episodes: int = at_least(2, 600)
    """Tasks to test on."""
    test_queries: int = at_least(1, 10)
    """Query examples a class in testing."""
    seeds: int = at_least(1, 1)
    """Repetitions."""

    @property
    def settings(self) -> dict[str, tuple[int, int]]:
        """Ways and shots of each setting by its name, such as ``5w1s``; with ``quick`` the first."""
        pairs = list(zip(self.ways, self.shots, strict=True))[: 1 if self.quick else None]
        return {f"{ways}w{shots}s": (ways, shots) for ways, shots in pairs}
