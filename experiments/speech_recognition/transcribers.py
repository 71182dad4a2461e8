"""Models of speech recognition, ready to be trained and tested: Whisper, and Wav2Vec2 or HuBERT with CTC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np

from jtl import pretrained
from jtl.data import Arrays
from jtl.data.dataset import Example
from jtl.data.encode import spectrograms
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Model
from jtl.tasks import CTC, Seq2Seq, ctc, teacher_forcing, transcribe

SECONDS = 30  # of a clip at most: what Whisper was trained on
AT_ONCE = 4  # clips of a batch


class Transcriber(Protocol):
    """How a kind of model reads clips in training, and transcribes them."""

    @property
    def loss(self) -> Loss:
        """What training minimises."""

    def rows(self, examples: Sequence[Example]) -> Arrays:
        """Clips with their texts, for a loader."""

    def write(self, model: Model, clips: Sequence[np.ndarray]) -> list[str]:
        """The transcript of each clip."""


def transcriber(name: str, model: Model, language: str) -> Transcriber:
    """The transcriber of a model. Raises ValueError for a model of something else."""
    tokenizer = pretrained.tokenizer(name)
    kind = getattr(model.config, "model_type", type(model.base).__name__)
    if kind == "whisper":
        return Whisper(model.config, tokenizer, language)
    if getattr(model.config, "ctc", False):
        return Letters(model.config, tokenizer)
    raise InputError(
        f"--model {name}: expected a Whisper, or a Wav2Vec2 or HuBERT with a CTC head, found {kind}"
    )


@dataclass(frozen=True)
class Whisper:
    """Sound to text by an encoder and a decoder, greedily."""

    config: Any
    tokenizer: Any
    language: str
    most: int = 160  # tokens of a transcript
    loss: Loss = Seq2Seq()

    def rows(self, examples: Sequence[Example]) -> Arrays:
        """Spectrograms of half a minute, and the fields of teacher forcing."""
        if self.config.multilingual:
            self.tokenizer.set_prefix_tokens(
                language=self.language, task="transcribe", predict_timestamps=False
            )
        # The tokenizer's own start is left out.
        ids = [self.tokenizer(f" {one['text']}")["input_ids"][1:] for one in examples]
        fields = teacher_forcing(*_padded(ids, 0), start_id=self.config.decoder_start_token_id)
        sounds = self._spectrograms([one["audio"] for one in examples])
        return Arrays({"log_mel": sounds, **{name: np.asarray(rows) for name, rows in fields.items()}})

    def write(self, model: Model, clips: Sequence[np.ndarray]) -> list[str]:
        """The transcripts."""
        written: list[str] = []
        for rows in _filled(len(clips)):
            sounds = self._spectrograms([clips[i] for i in rows])
            found = transcribe(
                model, self.tokenizer, sounds, language=self.language, max_new_tokens=self.most
            )
            written += [one.text for one in found]
        return written[: len(clips)]

    def _spectrograms(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([spectrograms.log_mel(clip, self.config.num_mel_bins, SECONDS) for clip in clips])


@dataclass(frozen=True)
class Letters:
    """Sound to letters by an encoder with a CTC head, the likeliest letter of each frame."""

    config: Any
    tokenizer: Any

    @cached_property
    def loss(self) -> Loss:
        """CTC with the model's own blank."""
        return CTC(blank=self.config.pad_token_id)

    def rows(self, examples: Sequence[Example]) -> Arrays:
        """Waveforms padded to the longest, and letters, -1 behind them."""
        capitals = "A" in self.tokenizer.get_vocab()
        texts = [one["text"].upper() if capitals else one["text"].lower() for one in examples]
        labels, _ = _padded([self.tokenizer(text)["input_ids"] for text in texts], -1)
        return Arrays({**spectrograms.waveforms([one["audio"] for one in examples]), "labels": labels})

    def write(self, model: Model, clips: Sequence[np.ndarray]) -> list[str]:
        """The transcripts."""
        length, written = max(map(len, clips)), []
        for rows in _filled(len(clips)):
            found = _frames(model, spectrograms.waveforms([clips[i] for i in rows], length))
            letters = ctc.decode(*map(np.asarray, found), blank=self.config.pad_token_id)
            written += [self.tokenizer.decode(own, group_tokens=False) for own in letters]
        return written[: len(clips)]


@jax.jit
def _frames(model: Model, batch: Any) -> tuple[jax.Array, jax.Array]:
    outputs = model(batch)
    return outputs["token_logits"], outputs["sequence_mask"]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows with ``fill`` behind the short ones, and a mask of what is real."""
    shape = len(rows), max(map(len, rows))
    ids, mask = np.full(shape, fill, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def _filled(count: int) -> list[np.ndarray]:
    """Batches of one size; the last is filled up with the last clip, so that nothing compiles anew."""
    size = min(AT_ONCE, count)
    return [np.minimum(np.arange(first, first + size), count - 1) for first in range(0, count, size)]
