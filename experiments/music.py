"""Music: Bach's chorales, of which few are at hand, by a decoder that knows fiddle tunes and folk songs.

A decoder of four layers is pre-trained on some 10,000 tunes, sung four at once in one metre and one scale, each in the
range of its voice, beside others that it sounds well with: quodlibets, which teach what voices, bars and keys are, and
little of harmony. ``transfer`` fine-tunes it on ``--train-pieces`` chorales; ``scratch`` trains the same architecture
from random weights on the same chorales, for as many updates; ``before`` is the pre-trained model as it is. Every row
is moved to another key within the ranges of a choir. The best of five validations is kept, and tested once; ``real``
are the test chorales themselves.

    python -m experiments.music --out runs/music

Expected: not yet run in full. One seed, after 420 updates of pre-training, a fifth of the default: on test ``before``
had 4.58 bits an event, ``transfer`` 3.89 and ``scratch`` 3.85, undecided. On validation ``transfer`` was far ahead
after 40 updates (4.00, 5.58) and after 80 (3.84, 4.20); then it began to know its chorales by heart.

The trained model lies in ``OUT/model``; it writes new pieces, here three, as MIDI, WAV and a piano roll each, others
with another ``--seed``:

    python -m experiments.music --out runs/music --predict 3

A piece is a sequence of tokens, ``jtl.data.music_tokens``: at every time at which a voice changes, where in the bar
that is, and a pitch, hold or rest for each voice, highest first. An event is a note that begins, and ``bits_per_event``
is what all tokens behind the header (bars and number of voices, which are given) cost together, -log2 of their
probabilities summed, over the number of notes of the test pieces: the same tokens for all arms. Samples are drawn with
a grammar that lets only a position stand where one must, and nothing of what is measured in them is forced.

The measures of samples: ``in_range``, notes that a soprano (C4 to A5), alto (F3 to E5), tenor (C3 to A4) or bass (E2 to
E4) can sing; ``all_voices``, time in which all four sound; ``in_key``, notes that belong to the key that music21 finds
(Krumhansl and Schmuckler); ``crossing``, time in which a voice is below the next lower one; ``copied``, runs of seven
notes in the soprano that stand in a training chorale, in whatever key. They say whether a sample is well formed, not
whether it is good music: listen.

The chorales are 401 of music21's corpus on a grid of sixteenths. No two splits share a melody, found by runs of seven
notes in any key and by the names of the hymns, and no tune of pre-training shares one with a chorale. All seeds share
one pre-training, whose own chance the intervals do not have.

What pre-training sings matters. In short runs (420 updates of it, then 120; one seed, on validation) ``scratch`` needed
4.36 bits an event, ``transfer`` from tunes that meet by chance 4.20, from tunes that sound well together 3.94. Tunes
one at a time did harm: 4.48 on test after 300 updates, where ``scratch`` had 3.94.

Your own music: ``--data FOLDER`` of MIDI files, such as MAESTRO's (TensorFlow Datasets has no builder of it), whose
piano is dealt out to ``--voices`` voices on a grid that a performance does not keep: a coarse picture of it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.application import MODEL, transferred_or_scratch
from experiments.cli import cli
from experiments.ledger import Ledger
from experiments.output import Config, command, prepare, settings
from jtl import pretrained
from jtl.data import DataError, midi, music_corpus
from jtl.data.loader import Batches, loader
from jtl.data.music import Piece, phrases, quodlibets, split, without
from jtl.data.music_tokens import BAR, END, SIZE, START, VOICES, Crops, Grammar, Whole, decode, keys_between
from jtl.files import write_file
from jtl.model import Model
from jtl.tasks import CausalLM, generate
from jtl.tasks.music import all_sound, crossing, find_key, in_key, in_range
from jtl.train import adamw, figures, fit, make_step, schedule
from jtl.train.checkpoint import Checkpoints
from jtl.train.figures import png
from jtl.train.report import Result, Section, environment, summarise, table, write_report, write_result
from jtl.train.result import to_json

CHORALES = "chorales"
CHOIR = {"soprano": (60, 81), "alto": (53, 76), "tenor": (48, 69), "bass": (40, 64)}
ROUNDS = 4  # how often each tune is sung with others
# Peaks of AdamW. Those of transfer and scratch by validation of runs of 60 to 200 updates on other training pieces,
# after 420 updates of pre-training; that of pre-training was not searched.
RATES = {"pretraining": 3e-3, "transfer": 1e-3, "scratch": 4e-3}
DECAY = 0.1  # its weight decay
PRETRAINING, PRETRAINED, SAMPLES, FORM = "pretraining", "pretrained", "samples", "form.json"  # in --out
LONGEST = 640  # new tokens of a sample: 128 chords
SHOWN = {"transfer": 4, "scratch": 2, "before": 2, "real": 2}  # pieces that are kept
METRICS = ("bits_per_event", "in_range", "all_voices", "in_key", "crossing", "copied", "seconds")
TITLES = {
    "real": "Real test pieces",
    **{arm: f"Samples of {arm}" for arm in ("transfer", "scratch", "before")},
}


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


def run(config: Music) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("pretraining_updates", "updates", "batch_size", "width", "layers", "samples"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "music")
    ledger = Ledger(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    composer = Composer(sizes)
    print(composer)
    ledger.get(composer.pretrain, arm=PRETRAINING, seed=sizes.seed)
    ledger.get(partial(composer.measured, "real", sizes.seed), arm="real", seed=sizes.seed)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = ledger.get(partial(composer.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  {row['bits_per_event']:.3f} bits an event  {row['seconds']:.0f} s")

    arms = [row for row in ledger.rows if row["arm"] != PRETRAINING]
    result = Result("music", settings(config), environment(), ledger.seconds, ledger.rows,
                    summarise(arms, METRICS))  # fmt: skip
    write_result(out, result)
    write_report(
        out,
        result,
        title="Music",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("music", config),
        sections=_sections(composer, ledger),
        notes=composer.notes,
    )
    return result


def shortened(config: Music) -> Music:
    """The settings of ``--quick``."""
    few = {"pretraining_updates": 40, "updates": 20, "train_pieces": 8, "samples": 2, "length": 128, "width": 64,
           "layers": 2, "batch_size": 8}  # fmt: skip
    return replace(
        config, seeds=1, **{name: min(most, getattr(config, name) or most) for name, most in few.items()}
    )


class Composer:
    """The pieces, the tunes, and the arms that learn from them."""

    def __init__(self, config: Music) -> None:
        self.config, self.out = config, Path(config.out)
        own, self.notes = (music_corpus.chorales(), ()) if config.data == CHORALES else midi.load_midi(
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
        """Quodlibets to pre-train on, and some of tunes that are held out; no tune shares a melody with the pieces."""
        quick = self.config.quick
        found = music_corpus.tunes((music_corpus.FIDDLE,) if quick else music_corpus.COLLECTIONS)
        found = without(found, [piece for pieces in self.splits.values() for piece in pieces])
        order = np.random.default_rng(0).permutation(len(found))
        held = 40 if quick else 200
        low, high = zip(*self.ranges, strict=True)
        print(f"{len(found) - held} tunes to pre-train on, {held} held out")
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
        """The row of pre-training on tunes, and its learning curve; stores the model."""
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
        """The model after training on few pieces, and its learning curve; keeps the first of ``transfer``."""
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
        """The model that validated best, and the learning curve."""
        size = min(self.config.batch_size, len(rows))
        step = make_step(CausalLM(mask="counts"), adamw(schedule(RATES[arm], steps), weight_decay=DECAY))
        held_out = Whole(validation, self.config.length)
        found = fit(
            step,
            step.init(model, jax.random.key(seed)),
            loader(Batches(rows, size, seed=seed, epochs=-(-steps // (len(rows) // size)))),
            steps=steps,
            validate=lambda model: {"bits_per_event": bits_per_event(model, held_out)},
            validate_every=-(-steps // (2 if self.config.quick else 5)),
            metric="bits_per_event",
            mode="min",
            checkpoints=checkpoints,
            resume=self.config.resume and checkpoints is not None,
        )
        return found.model, found.history

    # --- measures ----------------------------------------------------------------------------------

    @property
    def bar(self) -> int:
        """The commonest length of a bar, of which samples are."""
        return Counter(piece.bar for piece in self.splits["train"]).most_common(1)[0][0]

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm: what test costs it, and what its samples are like; keeps some of the first seed."""
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
        """What can be counted in pieces: means over them."""
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


@jax.jit
def _bits(model: Model, batch: Any) -> tuple[jax.Array, jax.Array]:
    value, metrics = CausalLM(mask="counts").value(model, model(batch), batch, None)
    return value, metrics["tokens"]


def bits_per_event(model: Model, rows: Whole) -> float:
    """What a model needs for the tokens of pieces, in bits, over their notes."""
    batches = Batches(rows, min(16, len(rows)), train=False)
    found = np.array([_bits(model, batch) for batch in batches], np.float64)
    return float(found.prod(1).sum() / np.log(2) / rows.notes)


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
    write_file(path.with_suffix(".png"), png(rolls([piece], names)))


def rolls(pieces: Sequence[Piece], names: Sequence[str]) -> Any:
    """The piano rolls of pieces, with the keys that music21 finds."""
    titles = [f"{piece.title}: {find_key(piece.notes).name}" for piece in pieces]
    bars = [(piece.bar, piece.upbeat) for piece in pieces]
    return figures.piano_rolls([piece.notes for piece in pieces], titles, bars, names)


def _ranges(pieces: Sequence[Piece], voices: int) -> tuple[tuple[int, int], ...]:
    notes = np.concatenate([piece.notes for piece in pieces])
    own = [notes[notes[:, 0] == voice, 3] for voice in range(voices)]
    return tuple((int(pitch.min()), int(pitch.max())) for pitch in own)


# --- use again -------------------------------------------------------------------------------------


def write_new(config: Music, count: int) -> None:
    """Write new pieces by the model in ``config.out``, into its folder ``new``."""
    out = Path(config.out)
    if not (out / MODEL / FORM).exists():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {out / MODEL} is none: run without --predict first"
        )
    if count < 1:
        raise ValueError(f"--predict is how many pieces to write, at least 1, got {count}")
    form = json.loads((out / MODEL / FORM).read_text(encoding="utf-8"))
    model = pretrained.load(out / MODEL)
    folder = out / "new"
    folder.mkdir(exist_ok=True)
    for i, piece in enumerate(compose(model, config, form["bar"], form["voices"], count, config.seed)):
        write_piece(folder / f"{i + 1}", piece, config.tempo, form["names"])
        print(
            f"{folder / str(i + 1)}.mid, .wav, .png: {len(piece.notes)} notes, {find_key(piece.notes).name}"
        )


# --- report ----------------------------------------------------------------------------------------


def _sections(composer: Composer, ledger: Ledger) -> list[Section]:
    first = next(row for row in ledger.rows if row["arm"] == PRETRAINING)
    sections = [
        transferred_or_scratch(ledger.rows, ("bits_per_event",), better="less"),
        Section(
            "Pre-training",
            f"{first['quodlibets']:,} quodlibets, {first['quodlibet_bits_per_event']:.3f} bits an event on those of "
            f"tunes that were held out, in {first['seconds']:.0f} s.",
        ),
        Section(
            "Learning curves",
            "Training loss in nats a token, and bits an event on validation.",
            figures.learning_curves(
                [row for row in ledger.curves if row["arm"] != PRETRAINING], "validation_bits_per_event"
            ),
        ),
    ]
    for arm, title in TITLES.items():
        if pieces := kept(composer.out, arm):
            links = ", ".join(f"[{i + 1}]({SAMPLES}/{arm}_{i + 1}.wav)" for i in range(len(pieces)))
            sections.append(Section(title, f"As sound: {links}.", rolls(pieces, composer.names)))
    names = ("in_range", "all_voices", "in_key", "key_correlation", "crossing", "copied", "notes", "bars")
    rows = [
        [row["arm"], row["seed"], *(row.get(name) for name in names)] for row in ledger.rows if "notes" in row
    ]
    sections.append(
        Section("Samples in numbers", "Means over pieces.\n\n" + table(["arm", "seed", *names], rows))
    )
    return sections


def main(config: Music) -> Result | None:
    """Train; or write new pieces with what was trained."""
    if config.predict is None:
        return run(config)
    write_new(config, config.predict)
    return None


if __name__ == "__main__":
    cli(main, Music)
