"""Settings of the few-shot comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.common.settings import Config
from experiments.fewshot import methods as methods
from experiments.fewshot.episodes import Adapt
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
    algorithm: tuple[methods.Algorithm | Literal["all"], ...] = ("all",)
    """Which to compare; all is those of the table above."""
    ways: tuple[int, ...] = (5, 5, 20)
    """N of each setting."""
    shots: tuple[int, ...] = (1, 5, 1)
    """K of each setting, as many as --ways."""
    normalise: Normalise = "transductive"
    """Statistics of batch normalisation."""
    updates: int = 3000
    """Updates of meta-training, and of training on all classes."""
    tasks: int = 8
    """Tasks of an update of the gradient methods."""
    metric_tasks: int = 2
    """Tasks of an update of the metric learners, which have more ways."""
    metric_ways: int = 20
    """Ways of the tasks that metric learners train on; fewer if there are fewer training classes."""
    queries: int = 5
    """Query examples a class in training."""
    inner_steps: int = 1
    """Inner steps in training."""
    test_steps: int = 5
    """Inner steps in testing."""
    inner_rate: float | None = None
    """Rate of the inner steps; left out, the algorithm's own."""
    learning_rate: float = 3e-3
    """Highest outer rate of Adam; Reptile takes steps from 1 towards 0."""
    turns: bool = True
    """Turn each class of a training task by some quarters of a circle, which makes four classes of each, as the papers
    do for Omniglot. Images alone."""
    width: int = 32
    """Filters of conv4."""
    image_size: int = 28
    """Side of the images that conv4 and resnet12 see; under 40, conv4 takes strides in place of pooling."""
    max_length: int = 64
    """Longest text in tokens."""
    test_episodes: int = 600
    """Tasks to test on."""
    test_queries: int = 10
    """Query examples a class in testing."""
    seeds: int = 1
    """Repetitions."""
