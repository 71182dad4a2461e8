"""The study of speech recognition: its run, its report, and the adapter used again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import ResumableRows, at_most, predictions, prepare, study
from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.training import ADAPTER, SOUNDS, WRITTEN, Trainer
from experiments.speech_recognition.transcribers import SECONDS, transcriber
from jtl import adapters, data, pretrained
from jtl.data.dataset import Example
from jtl.data.encode import spectrograms
from jtl.data.readers import sound
from jtl.report import Result, Section, figures, format_estimate, paired_difference, table

ABOUT = """\
``before`` is Whisper base as it is; ``transfer`` trains LoRA on its queries and values (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) on clips of the accent, ``scratch`` trains the same architecture from random weights
on the same clips for as many updates. Speakers and sentences of test are not those of training. ``wer`` and ``cer`` are
the word and character error rates of ``jiwer``, over all clips together, in lower case without punctuation;
``english_wer`` is the word error rate on plain English in common voices, which the adapted model should not forget.
Validation picks the checkpoint, which is tested once. The default speech is synthesised by eSpeak NG: film reviews in
its Scottish accent, and first lines of scikit-learn's docstrings in British and American voices. It does not tell how
well people of Scotland are understood."""
METRICS = ("wer", "cer")
SHOWN = 8  # transcripts of the report


def run(config: SpeechRecognition) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "speech_recognition")
    rows = ResumableRows(out, resume=config.resume)
    few = {"train_examples": 4, "test_examples": 2, "updates": 2, "batch_size": 1, "seeds": 1, "english": 0}
    sizes = at_most(config, **few) if config.quick else config
    trainer = Trainer(sizes)
    print(trainer.dataset)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = rows.get(partial(trainer.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  word error rate {row['wer']:.3f}  {row['seconds']:.0f} s")

    notes = (
        f"Data: {trainer.dataset.origin}.",
        *trainer.dataset.notes,
        f"Clips of over {SECONDS} seconds are left out.",
    )
    return study.finish(
        "speech_recognition", config, rows, _sections(trainer, rows), title="Speech recognition", about=ABOUT,
        metrics=(*METRICS, *(["english_wer"] if trainer.english else [])), notes=notes,
    )  # fmt: skip


def predict(config: SpeechRecognition) -> None:
    """Transcribe WAV files with the adapter in ``config.out``; writes predictions.json there."""
    assert config.predict is not None
    out, path = Path(config.out), config.predict
    adapter = predictions.trained(out / ADAPTER)
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
    adapted = adapters.merge(adapters.peft.load(model, adapter))
    written = transcriber(config.model, model, config.language).write(adapted, clips)
    rows = [{"file": str(file), "text": text} for file, text in zip(files, written, strict=True)]
    predictions.write_json(out, rows, "{file}: {text}", "clips transcribed")


# --- report ----------------------------------------------------------------------------------------


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    before = next(row for row in rows.rows if row["arm"] == "before")
    own = [row for row in rows.rows if row["arm"] == "transfer"]
    paired = [*own, *({**before, "seed": row["seed"]} for row in own)]
    metrics = [metric for metric in (*METRICS, "english_wer") if metric in before]
    lines = [
        [metric, f"{before[metric]:.3f}", format_estimate(paired_difference(paired, metric, "transfer", "before")),
         f"{np.mean([row[metric] for row in own]) / before[metric] - 1:+.0%}" if before[metric] else ""]
        for metric in metrics
    ]  # fmt: skip
    written = json.loads((trainer.out / WRITTEN).read_text(encoding="utf-8"))
    shown = [[one["text"], one["before"], one["transfer"], one["scratch"]] for one in written[:SHOWN]]
    return [
        Section(
            "Before and after",
            "``before`` has one value, which stands against every seed.\n\n"
            + table(["metric", "before", "transfer less before", "relative"], lines),
        ),
        study.transferred_or_scratch(rows.rows, METRICS, better="less"),
        Section(
            "Learning curves",
            "Training and validation loss in nats.",
            figures.learning_curves(rows.curves, "validation_loss"),
        ),
        Section(
            "What was heard",
            f"The first test clips in random order, not selected; arms of the first seed. Two of them lie in "
            f"`{SOUNDS}`; this is the first.\n\n" + table(["said", "before", "transfer", "scratch"], shown),
            _spectrogram(trainer.test[0]),
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
