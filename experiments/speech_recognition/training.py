"""Trains the speech recognisers, and measures their error rates."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.io import wavfile

from experiments.common import predictions, recipe
from experiments.speech_recognition import accents
from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.transcribers import SECONDS, transcriber
from jtl import adapters, data, finetune, pretrained
from jtl.data.batches.loader import Batches
from jtl.data.dataset import Example, Source
from jtl.data.readers import sound
from jtl.model import Model
from jtl.outputs import mean_loss

RATES = {"transfer": 1e-3, "scratch": 5e-4}  # peaks of AdamW, not searched
ADAPTER, WRITTEN, SOUNDS = "adapter", "written.json", "sounds"  # in --out


class Trainer:
    """A model, clips with their transcripts, and the arms that learn from them."""

    def __init__(self, config: SpeechRecognition) -> None:
        self.config, self.out = config, Path(config.out)
        self.dataset = (
            accents.accented()
            if config.data == "scottish"
            else data.load(config.data, "speech", text_column=config.text_column)
        )
        self.test = some(self.dataset.splits["test"], config.test_examples, 0)
        self.validation = some(self.dataset.splits["validation"], 2 if config.quick else 6, 0)
        known = config.english and config.language == "en"
        self.english = some(accents.english(), config.english, 0) if known else []
        self.model = pretrained.load(config.model)
        self.transcriber = transcriber(config.model, self.model, config.language)

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm on test, and its learning curve; stores the transcripts of the first seed."""
        began, model = time.monotonic(), self.model
        curve: list[dict[str, Any]] = []
        if arm != "before":
            model, curve = self.trained(arm, seed)
        row, written = self.tested(model, self.test)
        if self.english and arm != "scratch":
            row["english_wer"] = self.tested(model, self.english)[0]["wer"]
        if seed == self.config.seed:
            self._keep(arm, written)
        return {**row, "seconds": time.monotonic() - began}, curve

    def tested(self, model: Model, clips: Sequence[Example]) -> tuple[dict[str, float], list[str]]:
        """The error rates of a model on clips, and its transcripts."""
        written = self.transcriber.write(model, [one["audio"] for one in clips])
        return error_rates([one["text"] for one in clips], written), written

    def trained(self, arm: str, seed: int) -> tuple[Model, list[dict[str, Any]]]:
        """The model after training, and its learning curve; stores the first adapter."""
        config, loss = self.config, self.transcriber.loss
        clips = self.transcriber.rows(some(self.dataset.splits["train"], config.train_examples, seed))
        size, steps = min(config.batch_size, len(clips)), config.updates
        init_key, run_key = jax.random.split(jax.random.key(seed))
        labels: Any = None
        if arm == "transfer":
            model = adapters.lora(self.model, rank=config.rank, key=init_key)
            labels = finetune.train_only(model, ".*/lora/.*")
        else:
            model = pretrained.scratch(config.model, key=init_key)
        held_out = list(Batches(self.held_out, size, train=False, buckets=(1,)))
        fitted = recipe.train(
            recipe.Recipe(model, loss, Batches(clips, size, seed=seed, steps=steps), labels),
            steps=steps,
            rate=RATES[arm],
            seed=run_key,
            validate=lambda model: {"loss": mean_loss(loss, model, held_out)[0]},
            validate_every=-(-steps // (1 if config.quick else 2)),
            metric="loss",
            mode="min",
        )
        if arm == "scratch":
            return fitted.model, fitted.history
        if seed == config.seed:
            shutil.rmtree(self.out / ADAPTER, ignore_errors=True)  # of a run that was killed
            adapters.peft.save(fitted.model, self.out / ADAPTER)
        return adapters.merge(fitted.model), fitted.history

    @cached_property
    def held_out(self) -> data.Arrays:
        """The validation clips."""
        return self.transcriber.rows(self.validation)

    def _keep(self, arm: str, written: list[str]) -> None:
        examples = [{"text": one["text"], "voice": one.get("voice", "")} for one in self.test]
        predictions.keep_texts(self.out / WRITTEN, examples, arm, written)
        (self.out / SOUNDS).mkdir(exist_ok=True)
        for i, one in enumerate(self.test[:2]):
            wavfile.write(self.out / SOUNDS / f"test_{i}.wav", sound.RATE, one["audio"].astype(np.float32))


def some(source: Source, count: int, seed: int) -> list[Example]:
    """``count`` clips in a random order, or all for 0, without those that are too long. Raises DataError if all are."""
    chosen, order = [], np.random.default_rng(seed).permutation(len(source))
    for i in order:
        one = source[int(i)]
        if len(one["audio"]) <= SECONDS * sound.RATE:
            chosen.append(one)
        if len(chosen) == count:
            break
    if not chosen:
        raise data.DataError(
            f"all {len(order)} clips of a split are longer than {SECONDS} seconds: cut them at pauses"
        )
    return chosen


def plain(text: str) -> str:
    """Small letters and digits, a space between words.

    >>> plain("Don't stop -- it's well-made!")
    'dont stop its well made'
    """
    return " ".join(re.sub(r"[^\w\s]", "", re.sub(r"[-–—]", " ", text.lower())).split())


def error_rates(texts: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """``wer`` and ``cer`` over all texts together, by ``jiwer``; 0 is exact, and 1 may be exceeded."""
    import jiwer

    sides = [plain(text) for text in texts], [plain(text) for text in written]
    return {"wer": float(jiwer.wer(*sides)), "cer": float(jiwer.cer(*sides))}
