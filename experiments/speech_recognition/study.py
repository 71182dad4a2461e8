"""Speech recognition: a model that hears people well learns an accent that it does not, from minutes of speech.

``before`` is Whisper base as it is; ``transfer`` trains LoRA on its queries and values (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) on clips of the accent, ``scratch`` all of the same architecture from random weights,
on the same clips for as many updates. The speakers of test are not those of training, nor are the sentences.
``english_wer`` is that of plain English in common voices, which the adapted model should not unlearn. The better of two
validations is kept, and tested once.

    python -m experiments.speech_recognition --out runs/speech_recognition

Expected (``experiments/results/speech_recognition.json``, three seeds, 22 minutes on two cores): ``wer`` 0.399
(``before``), 0.141 ± 0.018 (``transfer``: 65 % less), 1.000 (``scratch``, which learns to say nothing); ``cer`` 0.201,
0.052 ± 0.002, 1.000; ``english_wer`` 0.168 and 0.097 ± 0.021: plain English gains too.

The trained adapter lies in ``OUT/adapter``, as PEFT has them; it writes down a WAV file, or those in a folder:

    python -m experiments.speech_recognition --out runs/speech_recognition --predict recordings

The speech is synthesised by eSpeak NG: film reviews in the accent that it makes of Scotland's, at 175 words a minute,
and first lines of scikit-learn's docstrings in voices of Britain and America, at 150. These are machine voices; what
people of Scotland say is another matter. Your own recordings: ``--data FOLDER`` with WAV files and a ``metadata.csv``
of ``file_name`` and ``text``. Public data: ``--data tfds:librispeech``. A Wav2Vec2 or HuBERT with a head for CTC serves
too, by a folder or a hub id: ``--model facebook/wav2vec2-base-960h``.

Rates of errors are those of ``jiwer``, over all clips together, of small letters without points: ``wer`` counts words,
``cer`` letters.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from experiments.common.study import transferred_or_scratch
from experiments.speech_recognition import accents
from experiments.speech_recognition.transcribers import SECONDS, transcriber
from jtl import adapters, data, finetune, pretrained
from jtl._files import write_file
from jtl.data.batches.loader import Batches, loader
from jtl.data.dataset import Example, Source
from jtl.data.encode import spectrograms
from jtl.data.readers import sound
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Model
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    format_estimate,
    paired_difference,
    summarise,
    table,
    write_report,
    write_result,
)
from jtl.report.result import to_json
from jtl.train import adamw, fit, make_step, schedule

RATES = {"transfer": 1e-3, "scratch": 5e-4}  # peaks of AdamW, not searched
ADAPTER, WRITTEN, SOUNDS = "adapter", "written.json", "sounds"  # in --out
METRICS = ("wer", "cer")
SHOWN = 8  # transcripts of the report


@dataclass(frozen=True, kw_only=True)
class SpeechRecognition(Config):
    """Settings of the application."""

    model: str = "whisper-base"
    """The model that is adapted: a Whisper, or a Wav2Vec2 or HuBERT with a head for CTC."""
    data: str = "scottish"
    """Speech with transcripts: scottish, a folder with WAV files and a metadata.csv, or tfds:NAME."""
    language: str = "en"
    """What is spoken, for Whisper."""
    text_column: str | None = None
    """Column of the transcripts in your own table or a tfds data set."""
    train_examples: int = 48
    """Training clips of up to half a minute; 0 for all there are."""
    test_examples: int = 20
    """Test clips; 0 for all there are."""
    updates: int = 24
    """Updates of transfer and of scratch."""
    batch_size: int = 2
    """Clips of an update."""
    rank: int = 8
    """Of LoRA."""
    english: int = 8
    """Clips of plain English (none with another --language) to measure what is unlearned. They need Linux on x86-64."""
    seeds: int = 3
    """Repetitions: other training clips, adapters and orders."""
    predict: Path | None = None
    """A WAV file, or a folder of them, for the adapter that an earlier run left in --out."""


def run(config: SpeechRecognition) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("updates", "batch_size", "rank"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "speech_recognition")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    room = Trainer(sizes)
    print(room.dataset)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = ledger.get(partial(room.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  word errors {row['wer']:.3f}  {row['seconds']:.0f} s")

    metrics = [*METRICS, *(["english_wer"] if room.english else []), "seconds"]
    summary = summarise(ledger.rows, metrics)
    result = Result(
        "speech_recognition", settings(config), environment(), ledger.seconds, ledger.rows, summary
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title="Speech recognition",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("speech_recognition", config),
        sections=_sections(room, ledger),
        notes=[
            f"Data: {room.dataset.origin}.",
            *room.dataset.notes,
            f"Clips of over {SECONDS} seconds are left out.",
        ],
    )
    return result


def shortened(config: SpeechRecognition) -> SpeechRecognition:
    """The settings of ``--quick``."""
    few = {"train_examples": 4, "test_examples": 2, "updates": 2, "batch_size": 1, "english": 0}
    return replace(
        config, seeds=1, **{name: min(most, getattr(config, name) or most) for name, most in few.items()}
    )


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
        self.listener = transcriber(config.model, self.model, config.language)

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm on test, and its learning curve; keeps what the first seed writes."""
        began, model, curve = time.monotonic(), self.model, []
        if arm != "before":
            model, curve = self.trained(arm, seed)
        written = self.listener.write(model, [one["audio"] for one in self.test])
        row = errors([one["text"] for one in self.test], written)
        if self.english and arm != "scratch":
            heard = self.listener.write(model, [one["audio"] for one in self.english])
            row["english_wer"] = errors([one["text"] for one in self.english], heard)["wer"]
        if seed == self.config.seed:
            self._keep(arm, written)
        return {**row, "seconds": time.monotonic() - began}, curve

    def trained(self, arm: str, seed: int) -> tuple[Model, list[dict[str, Any]]]:
        """The model after training, and its learning curve; stores the first adapter."""
        config, transcriber = self.config, self.listener
        clips = transcriber.rows(some(self.dataset.splits["train"], config.train_examples, seed))
        size, steps = min(config.batch_size, len(clips)), config.updates
        init_key, run_key = jax.random.split(jax.random.key(seed))
        labels: Any = None
        if arm == "transfer":
            model = adapters.lora(self.model, rank=config.rank, key=init_key)
            labels = finetune.train_only(model, ".*/lora/.*")
        else:
            model = pretrained.scratch(config.model, key=init_key)
        step = make_step(transcriber.loss, adamw(schedule(RATES[arm], steps)), labels)
        held_out = list(Batches(self.held_out, size, train=False, buckets=(1,)))
        fitted = fit(
            step,
            step.init(model, run_key),
            loader(Batches(clips, size, seed=seed, steps=steps)),
            steps=steps,
            validate=lambda model: {"loss": _mean_loss(transcriber.loss, model, held_out)},
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
    def held_out(self) -> Any:
        """The validation clips."""
        return self.listener.rows(self.validation)

    def _keep(self, arm: str, written: list[str]) -> None:
        from scipy.io import wavfile

        path = self.out / WRITTEN
        known = (
            json.loads(path.read_text(encoding="utf-8"))
            if path.exists()
            else [{"text": one["text"], "voice": one.get("voice", "")} for one in self.test]
        )
        rows = [{**one, arm: text} for one, text in zip(known, written, strict=True)]
        write_file(path, to_json(rows))
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


@jax.jit
def _loss(loss: Loss, model: Model, batch: Any) -> jax.Array:
    return loss.value(model, model(batch), batch, None)[0]


def _mean_loss(loss: Loss, model: Model, batches: Sequence[Any]) -> float:
    """Mean over the batches, in nats."""
    return float(np.mean([_loss(loss, model, batch) for batch in batches]))


def plain(text: str) -> str:
    """Small letters and digits, a space between words.

    >>> plain("Don't stop -- it's well-made!")
    'dont stop its well made'
    """
    return " ".join(re.sub(r"[^\w\s]", "", re.sub(r"[-–—]", " ", text.lower())).split())


def errors(said: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """``wer`` and ``cer`` over all texts together, by ``jiwer``; 0 is exact, and 1 may be exceeded."""
    import jiwer

    sides = [plain(text) for text in said], [plain(text) for text in written]
    return {"wer": float(jiwer.wer(*sides)), "cer": float(jiwer.cer(*sides))}


# --- use again -------------------------------------------------------------------------------------


def write_down(config: SpeechRecognition, path: Path) -> None:
    """Write down WAV files by the adapter in ``config.out``; writes predictions.json there."""
    out = Path(config.out)
    if not (out / ADAPTER).is_dir():
        raise FileNotFoundError(
            f"--predict needs a trained adapter, and {out / ADAPTER} is none: run without --predict first"
        )
    files = sorted(path.glob("*.wav")) if path.is_dir() else [path]
    if not files:
        raise data.DataError(f"{path}: holds no .wav file")
    clips = []
    for file in files:
        rate, samples = sound.read_any(file)
        clips.append(samples if rate == sound.RATE else sound.resample(samples, rate))
        if len(clips[-1]) > SECONDS * sound.RATE:
            raise data.DataError(f"{file}: longer than {SECONDS} seconds: cut it at pauses")
    model = pretrained.load(config.model)
    adapted = adapters.merge(adapters.peft.load(model, out / ADAPTER))
    written = transcriber(config.model, model, config.language).write(adapted, clips)
    rows = [{"file": str(file), "text": text} for file, text in zip(files, written, strict=True)]
    write_file(out / "predictions.json", to_json(rows))
    for row in rows[:20]:
        print(f"{Path(row['file']).name}: {row['text']}")
    print(f"{len(rows)} clips written down: {out / 'predictions.json'}")


# --- report ----------------------------------------------------------------------------------------


def _sections(room: Trainer, ledger: ResumableRows) -> list[Section]:
    rows = json.loads((room.out / WRITTEN).read_text(encoding="utf-8"))
    before = next(row for row in ledger.rows if row["arm"] == "before")
    own = [row for row in ledger.rows if row["arm"] == "transfer"]
    paired = [*own, *({**before, "seed": row["seed"]} for row in own)]
    metrics = [metric for metric in (*METRICS, "english_wer") if metric in before]
    lines = [
        [metric, f"{before[metric]:.3f}", format_estimate(paired_difference(paired, metric, "transfer", "before")),
         f"{np.mean([row[metric] for row in own]) / before[metric] - 1:+.0%}" if before[metric] else ""]
        for metric in metrics
    ]  # fmt: skip
    shown = [[row["text"], row["before"], row["transfer"], row["scratch"]] for row in rows[:SHOWN]]
    return [
        Section(
            "Before and after",
            "``before`` has one value, which stands against every seed.\n\n"
            + table(["metric", "before", "transfer less before", "relative"], lines),
        ),
        transferred_or_scratch(ledger.rows, METRICS, better="less"),
        Section(
            "Learning curves",
            "Training loss, and that of validation, in nats.",
            figures.learning_curves(ledger.curves, "validation_loss"),
        ),
        Section(
            "What was heard",
            f"The first test clips of the draw, not chosen; arms of the first seed. Two of them lie in `{SOUNDS}`; "
            "this is the first.\n\n" + table(["said", "before", "transfer", "scratch"], shown),
            _spectrogram(room.test[0]),
        ),
    ]


def _spectrogram(example: Example) -> Any:
    from matplotlib.figure import Figure

    seconds = len(example["audio"]) / sound.RATE
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        spectrograms.log_mel(example["audio"], seconds=None).T, origin="lower", aspect="auto",
        extent=(0, seconds, 0, 80), cmap="magma",
    )  # fmt: skip
    text = example["text"]
    axes.set(xlabel="seconds", ylabel="mel band", title=text if len(text) < 90 else f"{text[:89]}…")
    return figure


def predict(config: SpeechRecognition) -> None:
    """Write down by what was trained."""
    assert config.predict is not None
    write_down(config, config.predict)
