"""The study of music: its run, its report, and the model used again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from experiments.common import ResumableRows, at_most, predictions, prepare, study
from experiments.music.config import Music
from experiments.music.measures import find_key
from experiments.music.training import FORM, PRETRAINING, SAMPLES, Trainer, compose, kept, rolls, write_piece
from jtl import pretrained
from jtl.report import Result, Section, figures, summarise, table

ABOUT = """\
A small decoder is pretrained on fiddle tunes and folk songs, sung four at once in one metre and one scale, each in the
range of its voice and beside tunes that it sounds well with. These quodlibets teach what voices, bars and keys are, and
little of harmony. ``transfer`` fine-tunes it on ``--train-pieces`` of Bach's chorales; ``scratch`` trains the same
architecture from random weights on the same chorales, for as many updates; ``before`` is the pretrained model as it is;
``real`` are the test chorales themselves. Each training row is transposed to a random key within the ranges of a choir.
Validation picks the checkpoint, which is tested once. No two splits share a melody, by runs of seven notes in any key
and by the names of the hymns, and no tune of pretraining shares one with a chorale. All seeds share one pretraining, so
the intervals do not hold its own chance."""
BITS = """\
``bits_per_event`` is the negative log2-likelihood of all tokens behind the header (bars and number of voices, which are
given), summed and divided by the number of notes of the test pieces: the same tokens for all arms."""
MEASURES = """\
Means over pieces. They say whether a sample is well formed, not whether it is good music: listen. A grammar lets a
position stand only where one must; nothing that is measured here is forced.

* ``in_range``: share of notes within the range of their voice (for chorales soprano C4 to A5, alto F3 to E5, tenor C3
  to A4, bass E2 to E4);
* ``all_voices``: share of time in which all voices sound;
* ``in_key``: share of notes that belong to the key that music21 finds (Krumhansl and Schmuckler);
* ``crossing``: share of time in which a voice is below the next lower one;
* ``copied``: share of runs of seven notes in the highest voice that a training piece has too, in any key.

"""
METRICS = ("bits_per_event", "in_range", "all_voices", "in_key", "crossing", "copied", "seconds")
TITLES = {
    "real": "Real test pieces",
    **{arm: f"Samples of {arm}" for arm in ("transfer", "scratch", "before")},
}


def run(config: Music) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "music")
    rows = ResumableRows(out, resume=config.resume)
    few = {"pretraining_updates": 40, "updates": 20, "train_pieces": 8, "samples": 2, "length": 128, "width": 64,
           "layers": 2, "batch_size": 8, "seeds": 1}  # fmt: skip
    sizes = at_most(config, **few) if config.quick else config
    trainer = Trainer(sizes)
    print(trainer)
    rows.get(trainer.pretrain, arm=PRETRAINING, seed=sizes.seed)
    rows.get(partial(trainer.measured, "real", sizes.seed), arm="real", seed=sizes.seed)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = rows.get(partial(trainer.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  {row['bits_per_event']:.3f} bits per event  {row['seconds']:.0f} s")

    arms = [row for row in rows.rows if row["arm"] != PRETRAINING]
    return study.finish(
        "music", config, rows, _sections(trainer, rows), title="Music", about=ABOUT, summary=summarise(arms, METRICS),
        notes=trainer.notes,
    )  # fmt: skip


def predict(config: Music) -> None:
    """Generate new pieces with the model in ``config.out``, into its folder ``new``."""
    assert config.predict is not None
    out = Path(config.out)
    form = json.loads(predictions.trained(out / predictions.MODEL / FORM).read_text(encoding="utf-8"))
    model = pretrained.load(out / predictions.MODEL)
    folder = out / "new"
    folder.mkdir(exist_ok=True)
    for i, piece in enumerate(
        compose(model, config, form["bar"], form["voices"], config.predict, config.seed)
    ):
        write_piece(folder / f"{i + 1}", piece, config.tempo, form["names"])
        print(
            f"{folder / str(i + 1)}.mid, .wav, .png: {len(piece.notes)} notes, {find_key(piece.notes).name}"
        )


# --- report ----------------------------------------------------------------------------------------


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    first = next(row for row in rows.rows if row["arm"] == PRETRAINING)
    sections = [
        study.transferred_or_scratch(rows.rows, ("bits_per_event",), better="less"),
        Section(
            "Pre-training",
            f"{first['quodlibets']:,} quodlibets, {first['quodlibet_bits_per_event']:.3f} bits per event on those of "
            f"held-out tunes, in {first['seconds']:.0f} s.\n\n{BITS}",
        ),
        Section(
            "Learning curves",
            "Training loss in nats per token, and validation bits per event.",
            figures.learning_curves(
                [row for row in rows.curves if row["arm"] != PRETRAINING], "validation_bits_per_event"
            ),
        ),
    ]
    for arm, title in TITLES.items():
        if pieces := kept(trainer.out, arm):
            links = ", ".join(f"[{i + 1}]({SAMPLES}/{arm}_{i + 1}.wav)" for i in range(len(pieces)))
            sections.append(Section(title, f"As sound: {links}.", rolls(pieces, trainer.names)))
    names = ("in_range", "all_voices", "in_key", "key_correlation", "crossing", "copied", "notes", "bars")
    lines = [
        [row["arm"], row["seed"], *(row.get(name) for name in names)] for row in rows.rows if "notes" in row
    ]
    sections.append(Section("Samples in numbers", MEASURES + table(["arm", "seed", *names], lines)))
    return sections
