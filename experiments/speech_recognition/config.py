"""Settings of the speech recognition application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.common.settings import Config, at_least


@dataclass(frozen=True, kw_only=True)
class SpeechRecognition(Config):
    """Settings of the application."""

    model: str = "whisper-base"
    """The model that is adapted: a Whisper, or a Wav2Vec2 or HuBERT with a CTC head."""
    data: str = "scottish"
    """Speech with transcripts: scottish, a folder with WAV files and a metadata.csv, or tfds:NAME."""
    language: str = "en"
    """The language of the speech, for Whisper."""
    text_column: str | None = None
    """Column of the transcripts in your own table or a tfds data set."""
    train_examples: int = at_least(0, 48)
    """Training clips of up to half a minute; 0 for all there are."""
    test_examples: int = at_least(0, 20)
    """Test clips; 0 for all there are."""
    updates: int = at_least(1, 24)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 2)
    """Clips of an update."""
    rank: int = at_least(1, 8)
    """Of LoRA."""
    english: int = at_least(0, 8)
    """Clips of plain English (none with another --language) to measure forgetting. They need Linux on x86-64."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training clips, adapters and orders."""
    predict: Path | None = None
    """A WAV file, or a folder of them, to transcribe with the adapter that an earlier run left in --out."""
