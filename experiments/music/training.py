"""Trains the music models, and samples and scores pieces."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import recipe
from experiments.common.predictions import MODEL
from experiments.music.config import CHORALES, Music
from experiments.music.measures import all_sound, crossing, find_key, in_key, in_range
from experiments.music.pieces import phrases, quodlibets, split, without
from experiments.music.tokens import (
    BAR,
    END,
    SIZE,
    START,
    VOICES,
    Crops,
    Grammar,
    Whole,
    decode,
    keys_between,
)
from jtl import pretrained
from jtl._files import write_file
from jtl.data import DataError, midi
from jtl.data.batches.loader import Batches
from jtl.data.readers.midi import Piece
from jtl.data.sets import chorales
from jtl.model import Model
from jtl.outputs import mean_loss
from jtl.report import figures, to_json
from jtl.tasks import CausalLM, generate
from jtl.train import Checkpoints

CHOIR = {"soprano": (60, 81), "alto": (53, 76), "tenor": (48, 69), "bass": (40, 64)}
ROUNDS = 4  # how often each tune is sung with others
# Peaks of AdamW. Those of transfer and scratch by validation of shorter runs on other training pieces, after a shorter
# pretraining; that of pretraining was not searched.
RATES = {"pretraining": 3e-3, "transfer": 1e-3, "scratch": 4e-3}
DECAY = 0.1  # AdamW's weight decay
PRETRAINING, PRETRAINED, SAMPLES, FORM = "pretraining", "pretrained", "samples", "form.json"  # in --out
LONGEST = 640  # new tokens of a sample: 128 chords
SHOWN = {"transfer": 4, "scratch": 2, "before": 2, "real": 2}  # pieces that are kept


class Trainer:
    """The pieces, the tunes, and the arms that learn from them."""

    def __init__(self, config: Music) -> None:
        self.config, self.out = config, Path(config.out)
        own, self.notes = (chorales.chorales(), ()) if config.data == CHORALES else midi.load_midi(
            config.data, config.voices
        )  # fmt: skip
        self.splits = split(own)
        self.voices = own[0].voices
        if config.data == CHORALES:
            self.names, self.ranges = tuple(CHOIR), tuple(CHOIR.values())
        else:
            self.names = tuple(f"voice {i + 1}" for i in range(self.voices))
            self.ranges = _ranges(self.splits["train"], self.voices)
        counts = ", ".join(f"{name} {len(pieces)}" for name, pieces in self.splits.items())
        where = "the corpus of music21 10.5.1" if config.data == CHORALES else f"your files at {config.data}"
        self.notes = (f"Data: {len(own)} pieces ({counts}), of {where}.", *self.notes)
        if config.quick:
            self.splits = {name: pieces[:40] for name, pieces in self.splits.items()}
            self.splits["test"] = self.splits["test"][:8]

    def __str__(self) -> str:
        return "\n  ".join(self.notes)

    @cached_property
    def songs(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Quodlibets to pretrain on, and some of held-out tunes; no tune shares a melody with the pieces."""
        quick = self.config.quick
        found = chorales.tunes((chorales.FIDDLE,) if quick else chorales.COLLECTIONS)
        found = without(found, [piece for pieces in self.splits.values() for piece in pieces])
        order = np.random.default_rng(0).permutation(len(found))
        held = 40 if quick else 200
        low, high = zip(*self.ranges, strict=True)
        print(f"{len(found) - held} tunes to pretrain on, {held} held out")
        train = quodlibets([found[i] for i in order[held:]], low, high, rounds=ROUNDS)
        return train, quodlibets([found[i] for i in order[:held]], low, high)

    def few(self, seed: int) -> tuple[Piece, ...]:
        """The pieces to fine-tune on."""
        train = self.splits["train"]
        order = np.random.default_rng(seed).permutation(len(train))
        return tuple(train[i] for i in order[: self.config.train_pieces or None])

    def fresh(self, seed: int) -> Model:
        """The decoder with random weights."""
        config = self.config
        form = {
            "model_type": "mistral", "vocab_size": SIZE, "hidden_size": config.width,
            "intermediate_size": -(-config.width * 8 // 96) * 32, "num_hidden_layers": config.layers,
            "num_attention_heads": max(1, config.width // 32), "num_key_value_heads": max(1, config.width // 32),
            "max_position_embeddings": 4096,
            "initializer_range": config.width**-0.5, "sliding_window": config.length, "tie_word_embeddings": True,
            "bos_token_id": START, "eos_token_id": END,
        }  # fmt: skip
        folder = self.out / "architecture"
        folder.mkdir(exist_ok=True)
        write_file(folder / "config.json", json.dumps(form, indent=2))
        return pretrained.scratch(folder, key=jax.random.key(seed))

    # --- training ----------------------------------------------------------------------------------

    def pretrain(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of pretraining on tunes, and its learning curve; stores the model."""
        config, began = self.config, time.monotonic()
        train, held = self.songs
        low, high = zip(*self.ranges, strict=True)
        rows = Crops(train, config.length, keys_between(train, low, high))
        model, curve = self.fitted(
            self.fresh(config.seed), rows, held, PRETRAINING, config.seed, config.pretraining_updates,
            checkpoints=Checkpoints(self.out / PRETRAINING / "checkpoints"),
        )  # fmt: skip
        pretrained.save(model, self.out / PRETRAINED, overwrite=True)
        bits = bits_per_event(model, Whole(held, config.length))
        row = {
            "quodlibet_bits_per_event": bits,
            "quodlibets": len(train),
            "seconds": time.monotonic() - began,
        }
        return row, curve

    def trained(self, arm: str, seed: int) -> tuple[Model, list[dict[str, Any]]]:
        """The model after training on few pieces, and its learning curve; stores the first ``transfer``."""
        config, train = self.config, self.few(seed)
        low, high = zip(*self.ranges, strict=True)
        model = pretrained.load(self.out / PRETRAINED) if arm == "transfer" else self.fresh(seed + 1)
        rows = Crops(train, config.length, keys_between(train, low, high))
        validation = self.splits["validation"][: 4 if config.quick else 20]
        model, curve = self.fitted(model, rows, validation, arm, seed, config.updates)
        if arm == "transfer" and seed == config.seed:
            pretrained.save(model, self.out / MODEL, overwrite=True)
            form = {"bar": self.bar, "voices": self.voices, "names": self.names}
            write_file(self.out / MODEL / FORM, to_json(form))
        return model, curve

    def fitted(
        self, model: Model, rows: Crops, validation: Sequence[Piece], arm: str, seed: int, steps: int,
        checkpoints: Checkpoints | None = None,
    ) -> tuple[Model, list[dict[str, Any]]]:  # fmt: skip
        """The model of the best validation, and the learning curve."""
        size = min(self.config.batch_size, len(rows))
        held_out = Whole(validation, self.config.length)
        fitted = recipe.train(
            recipe.Recipe(model, CausalLM(mask="counts"), Batches(rows, size, seed=seed, steps=steps)),
            steps=steps,
            rate=RATES[arm],
            seed=seed,
            weight_decay=DECAY,
            validate=lambda model: {"bits_per_event": bits_per_event(model, held_out)},
            validate_every=-(-steps // (2 if self.config.quick else 5)),
            metric="bits_per_event",
            mode="min",
            checkpoints=checkpoints,
            resume=self.config.resume and checkpoints is not None,
        )
        return fitted.model, fitted.history

    # --- measures ----------------------------------------------------------------------------------

    @property
    def bar(self) -> int:
        """The commonest length of a bar, which samples have."""
        return Counter(piece.bar for piece in self.splits["train"]).most_common(1)[0][0]

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm: bits per event on test, measures of its samples; stores some samples of the first seed."""
        began, config = time.monotonic(), self.config
        row: dict[str, Any] = {}
        curve: list[dict[str, Any]] = []
        if arm == "real":
            pieces = list(self.splits["test"])
        else:
            if arm == "before":
                model = pretrained.load(self.out / PRETRAINED)
            else:
                model, curve = self.trained(arm, seed)
                row["steps"] = config.updates
            row["bits_per_event"] = bits_per_event(model, Whole(self.splits["test"], config.length))
            pieces = compose(model, config, self.bar, self.voices, config.samples, seed)
        row |= self.described(pieces, seed)
        if seed == config.seed:
            self.keep(arm, pieces[: SHOWN[arm]])
        return {**row, "seconds": time.monotonic() - began}, curve

    def described(self, pieces: Sequence[Piece], seed: int) -> dict[str, Any]:
        """The measures of pieces: means over them."""
        low, high = zip(*self.ranges, strict=True)
        known = set().union(*(phrases(piece.melody()) for piece in self.few(seed)))
        rows = []
        for piece in pieces:
            key, own = find_key(piece.notes), phrases(piece.melody())
            rows.append(
                {
                    "in_range": in_range(piece.notes, low, high),
                    "all_voices": all_sound(piece.notes, piece.voices),
                    "in_key": in_key(piece.notes, key),
                    "key_correlation": key.correlation,
                    "crossing": crossing(piece.notes, piece.voices),
                    "copied": len(own & known) / max(1, len(own)),
                    "notes": len(piece.notes),
                    "bars": piece.length / piece.bar,
                }
            )
        return {name: float(np.mean([own[name] for own in rows])) for name in rows[0]} if rows else {}

    def keep(self, arm: str, pieces: Sequence[Piece]) -> None:
        """Write pieces of an arm into the folder of samples, as sound and as data for the report."""
        folder = self.out / SAMPLES
        folder.mkdir(exist_ok=True)
        for i, piece in enumerate(pieces):
            write_piece(folder / f"{arm}_{i + 1}", piece, self.config.tempo, self.names)
        write_file(folder / f"{arm}.json", to_json(pieces))


def kept(out: Path, arm: str) -> list[Piece]:
    """The pieces of an arm that were kept."""
    stored = json.loads((out / SAMPLES / f"{arm}.json").read_text(encoding="utf-8"))
    return [Piece(**{**own, "notes": np.array(own["notes"], np.int32)}) for own in stored]


def bits_per_event(model: Model, rows: Whole) -> float:
    """The negative log2-likelihood of the tokens of pieces, over their notes."""
    batches = Batches(rows, min(16, len(rows)), train=False)
    mean, tokens = mean_loss(CausalLM(mask="counts"), model, batches, weight="tokens")
    return mean * tokens / float(np.log(2)) / rows.notes


def compose(model: Model, config: Music, bar: int, voices: int, count: int, seed: int) -> list[Piece]:
    """New pieces, ``count`` less those in which nothing sounds."""
    prompt = np.tile(np.array([START, BAR + bar - 1, VOICES + voices - 1], np.int32), (count, 1))
    new = generate(
        model, prompt, max_new_tokens=160 if config.quick else LONGEST, temperature=config.temperature,
        top_p=config.top_p, eos_id=END, key=jax.random.key(seed), rule=Grammar(bar, voices),
    )  # fmt: skip
    found = []
    for i, own in enumerate(np.asarray(new)):
        with suppress(DataError):  # the grammar allows a piece to end before its first note
            found.append(decode(np.concatenate([prompt[i], own]), f"sample {i + 1}"))
    return found


def write_piece(path: Path, piece: Piece, tempo: float, names: Sequence[str]) -> None:
    """Write ``path`` with .mid, .wav and .png behind it."""
    midi.write(path.with_suffix(".mid"), piece, tempo, names)
    midi.write_wav(path.with_suffix(".wav"), piece, tempo)
    write_file(path.with_suffix(".png"), figures.png(rolls([piece], names)))


def rolls(pieces: Sequence[Piece], names: Sequence[str]) -> Any:
    """The piano rolls of pieces, with the keys that music21 finds."""
    titles = [f"{piece.title}: {find_key(piece.notes).name}" for piece in pieces]
    bars = [(piece.bar, piece.upbeat) for piece in pieces]
    return figures.piano_rolls([piece.notes for piece in pieces], titles, bars, names)


def _ranges(pieces: Sequence[Piece], voices: int) -> tuple[tuple[int, int], ...]:
    notes = np.concatenate([piece.notes for piece in pieces])
    own = [notes[notes[:, 0] == voice, 3] for voice in range(voices)]
    return tuple((int(pitch.min()), int(pitch.max())) for pitch in own)
