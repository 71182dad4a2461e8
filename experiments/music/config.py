"""Settings of the music application."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.settings import Config, above, at_least

CHORALES = "chorales"


@dataclass(frozen=True, kw_only=True)
class Music(Config):
    """Settings of the application."""

    data: str = CHORALES
    """What is fine-tuned on: chorales, or a folder of MIDI files."""
    voices: int = at_least(1, 4)
    """Voices of your own pieces; denser music is dealt out to so many."""
    train_pieces: int = at_least(0, 20)
    """Pieces to fine-tune on; 0 for all there are."""
    pretraining_updates: int = at_least(1, 2300)
    """Updates of pretraining."""
    updates: int = at_least(1, 200)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 8)
    """Rows of an update."""
    length: int = at_least(1, 256)
    """Tokens of a row, and of the decoder's attention window."""
    width: int = at_least(1, 128)
    """Of the decoder."""
    layers: int = at_least(1, 4)
    """Of the decoder."""
    samples: int = at_least(1, 8)
    """Pieces that each arm and seed generates to be measured."""
    temperature: float = at_least(0, 1.0)
    """Of sampling."""
    top_p: float = above(0, 0.95)
    """Nucleus sampling: among the likeliest tokens that have so much probability together."""
    tempo: float = above(0, 80.0)
    """Quarters per minute of the WAV and MIDI files."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training pieces, first weights and samples."""
    predict: int | None = at_least(1, None)
    """How many new pieces to generate with the model that an earlier run left in --out."""
