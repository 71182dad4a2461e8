"""Settings of the music application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.common.settings import Config

if TYPE_CHECKING:
    from experiments.music.config import Music


CHORALES = "chorales"


@dataclass(frozen=True, kw_only=True)
class Music(Config):
    """Settings of the application."""

    data: str = CHORALES
    """What is learned in the end: chorales, or a folder of MIDI files."""
    voices: int = 4
    """Voices of your own pieces; denser music is dealt out to so many."""
    train_pieces: int = 20
    """Pieces to fine-tune on; 0 for all there are."""
    pretraining_updates: int = 2300
    """Updates of pre-training."""
    updates: int = 200
    """Updates of transfer and of scratch."""
    batch_size: int = 8
    """Rows of an update."""
    length: int = 256
    """Tokens of a row; the decoder looks back so far."""
    width: int = 128
    """Of the decoder."""
    layers: int = 4
    """Of the decoder."""
    samples: int = 8
    """Pieces that each arm and seed writes to be measured."""
    temperature: float = 1.0
    """At which samples are drawn."""
    top_p: float = 0.95
    """Samples are drawn among the likeliest tokens that have so much probability together."""
    tempo: float = 80.0
    """Quarters a minute in what is heard."""
    seeds: int = 3
    """Repetitions: other training pieces, first weights and samples."""
    predict: int | None = None
    """How many new pieces to write by the model that an earlier run left in --out."""
