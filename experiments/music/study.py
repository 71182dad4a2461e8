"""Music: Bach's chorales, of which few are at hand, by a decoder that knows fiddle tunes and folk songs.

A decoder of four layers is pre-trained on some 10,000 tunes, sung four at once in one metre and one scale, each in the
range of its voice, beside others that it sounds well with: quodlibets, which teach what voices, bars and keys are, and
little of harmony. ``transfer`` fine-tunes it on ``--train-pieces`` chorales; ``scratch`` trains the same architecture
from random weights on the same chorales, for as many updates; ``before`` is the pre-trained model as it is. Every row
is moved to another key within the ranges of a choir. The best of five validations is kept, and tested once; ``real``
are the test chorales themselves.

    python -m experiments.music --out runs/music

Expected (``experiments/results/music.json``, three seeds, 25 minutes on two cores): ``bits_per_event`` 4.077
(``before``), 3.452 ± 0.102 (``transfer``), 3.970 ± 0.328 (``scratch``); samples of ``transfer`` stay in range, all four
voices sound, and ``crossing`` is 0.045 ± 0.070 (0.018 in real ones). ``transfer`` is there after 40 to 80 updates, then
it learns its chorales by heart; ``scratch`` still gains at the end of the budget.

The trained model lies in ``OUT/model``; it writes new pieces, here three, as MIDI, WAV and a piano roll each, others
with another ``--seed``:

    python -m experiments.music --out runs/music --predict 3

A piece is a sequence of tokens, ``experiments.music.tokens``: at every time at which a voice changes, where in the bar
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
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.common.predictions import MODEL
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from experiments.common.study import transferred_or_scratch
from experiments.music.config import Music
from experiments.music.measures import find_key
from experiments.music.training import FORM, PRETRAINING, SAMPLES, Trainer, compose, kept, rolls, write_piece
from jtl import pretrained
from jtl.errors import InputError
from jtl.report import figures
from jtl.report.report import Result, Section, environment, summarise, table, write_report, write_result

METRICS = ("bits_per_event", "in_range", "all_voices", "in_key", "crossing", "copied", "seconds")
TITLES = {
    "real": "Real test pieces",
    **{arm: f"Samples of {arm}" for arm in ("transfer", "scratch", "before")},
}


def run(config: Music) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("pretraining_updates", "updates", "batch_size", "width", "layers", "samples"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "music")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    composer = Trainer(sizes)
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


# --- use again -------------------------------------------------------------------------------------


def write_new(config: Music, count: int) -> None:
    """Write new pieces by the model in ``config.out``, into its folder ``new``."""
    out = Path(config.out)
    if not (out / MODEL / FORM).exists():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {out / MODEL} is none: run without --predict first"
        )
    if count < 1:
        raise InputError(f"--predict is how many pieces to write, at least 1, got {count}")
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


def _sections(composer: Trainer, ledger: ResumableRows) -> list[Section]:
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


def predict(config: Music) -> None:
    """Write new pieces with what was trained."""
    assert config.predict is not None
    write_new(config, config.predict)
