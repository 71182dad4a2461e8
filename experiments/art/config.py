"""Settings of the art application."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.art import pictures as pictures
from experiments.common.settings import Config


@dataclass(frozen=True, kw_only=True)
class Art(Config):
    """Settings of the application."""

    data: str = "poster"
    """The new style: poster, rendered_digits, tfds:NAME, a folder of pictures, or a folder of them for each class."""
    shots: int = 2
    """Pictures of each class to learn from; a folder without train/ is taken whole."""
    pretraining_updates: int = 2000
    """Updates of the pre-training, of 64 old pictures each."""
    updates: int = 150
    """Updates of transfer and of scratch."""
    batch_size: int = 20
    """New pictures of an update, and old ones beside them."""
    rank: int = 8
    """Of LoRA."""
    guidance: float = 2.0
    """Strength of classifier-free guidance: 1 is none."""
    sampling_steps: int = 12
    """Steps of Heun's method from noise to a picture, two forwards each."""
    samples: int = 500
    """Pictures that each arm draws to be measured; at most half of the test pictures."""
    seeds: int = 3
    """Repetitions: other pictures to learn from, adapters, orders and noise. The pre-training is one for all."""
    count: int = 40
    """Pictures that --predict draws."""
    predict: str | None = None
    """A class, of which the model that an earlier run left in --out draws new pictures."""
