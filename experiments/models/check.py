"""Whether the models of jtl compute what those of `transformers` compute: ``python -m experiments.models check``.

Small random configurations of every architecture, and real weights; and, for Whisper, the words of synthesised speech.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import Config, ResumableRows, at_least, finish, prepare
from experiments.models import compare, random_models
from jtl import pretrained, tasks, tree
from jtl.data.encode import spectrograms
from jtl.data.sets import espeak
from jtl.errors import InputError
from jtl.models import ARCHITECTURES
from jtl.pretrained.load import find_architecture
from jtl.pretrained.sources import SHORT_NAMES, read_config
from jtl.report import Result, Section, estimate, table
from jtl.report.result import Row

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "She opened the window and looked at the garden.",
    "My brother bought three apples and a loaf of bread this morning.",
    "The train to London leaves at half past nine.",
    "We walked along the river until the sun went down.",
    "Please close the door when you leave the room.",
)
SPEED = 150  # words a minute
ERRORS = ("relative_error", "relative_error_weights")
ABOUT = (
    "`relative_error` of an architecture: small random configurations, saved by `transformers` and loaded by jtl; the "
    "largest difference of any output or hidden state, over the largest value of that output, in float32. Intervals "
    "are over the draws. `relative_error_weights`: the same on real weights, which `transformers` reads from the same "
    "folder, or from the one that `jtl.save` writes where it does not read theirs. `wer`: the share of words that a "
    "Whisper gets wrong of English sentences synthesised by eSpeak NG at 150 words a minute; case and punctuation do "
    "not count, and the interval is over voices."
)


@dataclass(frozen=True, kw_only=True)
class Check(Config):
    """Compare with transformers on this machine (needs the extra parity)."""

    architectures: tuple[str, ...] = ()
    """Which, by model_type; left out, all that transformers has."""
    draws: int = at_least(1, 6)
    """Random configurations of each."""
    weights: tuple[str, ...] = tuple(SHORT_NAMES)
    """Real weights: short names, folders or hub ids."""
    voices: tuple[str, ...] = ("en-us", "en", "en-us+m3", "en-us+f2")
    """Of the sentences that Whisper hears (Linux on x86-64)."""
    tolerance: float = 1e-4
    """The largest relative error that passes."""


def run(config: Check) -> Result:
    """Compare; writes into ``config.out`` and returns the result.

    Raises:
        InputError: torch is not installed, or an architecture is unknown or not one of transformers.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "check compares with transformers, which needs torch here: install the extra, pip install '.[parity]'"
        )
    import transformers

    transformers.utils.logging.disable_progress_bar()
    names = _architectures(config.architectures)
    rows = ResumableRows(prepare(config, "models"), resume=config.resume)
    draws, weights, voices = config.draws, config.weights, config.voices
    if config.quick:
        draws, weights, voices = 1, weights[:1], ()
    apart: dict[str, str] = {
        name: _no_oracle(name) for name in ARCHITECTURES if name not in random_models.NAMES
    }

    for name in names:
        for seed in range(config.seed, config.seed + draws):
            row = rows.get(partial(_without_curve, random_error, name, seed), arm=name, seed=seed)
            print(f"{name}  configuration {seed}  relative error {row['relative_error']:.1e}")
    for name in weights:
        kind = _kind(name)
        if kind not in random_models.NAMES:
            apart[name] = _no_oracle(kind)
            continue
        row = rows.get(partial(_without_curve, weights_error, name), arm=_arm(name))
        print(f"{name}  relative error {row['relative_error_weights']:.1e}")
    for name in weights:
        if _kind(name) != "whisper" or not voices:
            continue
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            apart[f"wer of {name}"] = "the synthesiser is for Linux on x86-64"
            continue
        for voice in voices:
            row = rows.get(partial(_without_curve, word_errors, name, voice), arm=_arm(name), voice=voice)
            print(f"{name}  {voice}  word error rate {row['wer']:.3f}")

    summary = {metric: found for metric in (*ERRORS, "wer") if (found := _estimates(rows.rows, metric))}
    limit = f"Every relative error is at most {config.tolerance:g}."
    return finish(
        "models",
        config,
        rows,
        _sections(rows.rows, apart),
        title="Models beside transformers",
        about=ABOUT,
        summary=summary,
        notes=failures(rows.rows, config.tolerance) or [limit],
        over="draws or voices",
        subcommand="check",
    )


def _without_curve(measure: Callable[..., dict[str, Any]], *args: Any) -> tuple[dict[str, Any], list[Any]]:
    return measure(*args), []


def failures(rows: Sequence[Row], limit: float) -> list[str]:
    """What of a check is above its tolerance."""
    return [
        f"{row['arm']}{'' if row.get('seed') is None else ', configuration ' + str(row['seed'])}: {row['output']} "
        f"differs by {row[metric]:.1e}, and --tolerance is {limit:g}"
        for row in rows
        for metric in ERRORS
        if metric in row and not (row[metric] is not None and row[metric] <= limit)
    ]


def random_error(name: str, seed: int) -> dict[str, Any]:
    """One random configuration of an architecture: the largest error of an output, and which has it."""
    rng = np.random.default_rng(seed)
    theirs = random_models.build(name, random_models.settings(name, rng))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = pretrained.load(folder)
        written = read_config(folder, Path(folder))
    inputs = random_models.batch(name, written, rng, padded=seed % 4 > 0)
    found = random_models.run(name, theirs, inputs)
    # A ViT's pooler is a setting of ours, which is off in what load gives.
    found = {output: value for output, value in found.items() if getattr(ours.config, output, True)}
    return _worst(compare.errors(ours, inputs, found), "relative_error")


def weights_error(name: str) -> dict[str, Any]:
    """The largest error of an output with real weights, of a random batch, and which output has it."""
    import transformers

    folder, ours = pretrained.resolve(name), pretrained.load(name)
    kind = read_config(name, folder)["model_type"]
    with tempfile.TemporaryDirectory() as saved:
        if not (folder / "model.safetensors").is_file():
            folder = pretrained.save(ours, Path(saved) / "model")
        theirs = getattr(transformers, ARCHITECTURES[kind].base_class).from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    inputs = random_models.batch(kind, theirs.config.to_dict(), rng)
    errors = compare.errors(ours, inputs, random_models.run(kind, theirs, inputs))
    return {**_worst(errors, "relative_error_weights"), "parameters": tree.size(ours.params)}


def word_errors(name: str, voice: str) -> dict[str, Any]:
    """The word error rate of a Whisper on the sentences in one voice, and its transcripts."""
    model, tokenizer = pretrained.load(name), pretrained.tokenizer(name)
    clips = espeak.synthesise(SENTENCES, voice, speed=SPEED)
    sounds = np.stack([spectrograms.log_mel(clip, model.config.num_mel_bins) for clip in clips])
    found = tasks.transcribe(model, tokenizer, sounds, language="en", max_new_tokens=40)
    written = [transcript.text for transcript in found]
    return {"wer": tasks.word_error_rate(plain(SENTENCES), plain(written)), "written": written}


def plain(texts: Sequence[str]) -> list[str]:
    """Texts in lower case, without punctuation."""
    return [re.sub(r"[^a-z ]", "", text.lower()) for text in texts]


def _worst(errors: dict[str, float], metric: str) -> dict[str, Any]:
    name = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return {metric: errors[name], "output": name, "outputs": len(errors)}


def _architectures(wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        if find_architecture(name).name not in random_models.NAMES:
            raise InputError(f"--architectures {name}: {_no_oracle(name)}")
    return list(wanted) or [name for name in ARCHITECTURES if name in random_models.NAMES]


def _no_oracle(kind: str) -> str:
    """Why an architecture is not compared."""
    import transformers

    there = hasattr(transformers, ARCHITECTURES[kind].base_class)
    ours = "experiments.models.random_models draws no configuration of it"
    return ours if there else "transformers does not have it"


def _kind(name: str) -> str:
    return read_config(name, pretrained.resolve(name))["model_type"]


def _arm(name: str) -> str:
    return Path(name).name.replace("-", "_")


def _estimates(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    arms = dict.fromkeys(row["arm"] for row in rows if metric in row)
    return {
        arm: estimate(row.get(metric) for row in rows if row["arm"] == arm and metric in row) for arm in arms
    }


def _sections(rows: Sequence[dict[str, Any]], apart: dict[str, str]) -> list[Section]:
    compared = [
        [row["arm"], row.get("seed", "real weights"), row[metric], row["output"], row["outputs"]]
        for row in rows
        for metric in ERRORS
        if row.get(metric) is not None
    ]
    columns = ["model", "configuration", "largest relative error", "of", "outputs"]
    sections = [Section("Every comparison", table(columns, compared))]
    if transcripts := [row for row in rows if "wer" in row]:
        lines = [
            [row["voice"], said, written]
            for row in transcripts
            for said, written in zip(SENTENCES, row["written"], strict=True)
            if plain([said]) != plain([written])
        ]
        sections.append(Section("Sentences misheard", table(["voice", "said", "written"], lines)))
    if apart:
        sections.append(Section("Not compared", table(["what", "why"], list(map(list, apart.items())))))
    return sections
