"""Settings of the art application."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.settings import Config, at_least


@dataclass(frozen=True, kw_only=True)
class Art(Config):
    """Settings of the application."""

    data: str = "poster"
    """The new style: poster, rendered_digits, tfds:NAME, a folder of pictures, or a folder of them for each class."""
    shots: int = at_least(1, 2)
    """Pictures of each class to learn from; a folder without train/ is taken whole."""
    pretraining_updates: int = at_least(1, 2000)
    """Updates of pretraining, of 64 old pictures each."""
    updates: int = at_least(1, 150)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 20)
    """New pictures of an update, and old ones beside them."""
    rank: int = at_least(1, 8)
    """Of LoRA."""
    guidance: float = 2.0
    """Strength of classifier-free guidance: 1 is none."""
    sampling_steps: int = at_least(1, 12)
    """Steps of Heun's method from noise to a picture, two forwards each."""
    samples: int = at_least(20, 500)
    """Pictures that each arm generates to be measured; at most half of the test pictures."""
    seeds: int = at_least(1, 3)
    """Repetitions: other pictures to learn from, adapters, orders and noise. All share one pretraining."""
    count: int = at_least(1, 40)
    """Pictures that --predict generates."""
    predict: str | None = None
    """A class, of which to generate new pictures with the model that an earlier run left in --out."""
