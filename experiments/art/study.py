"""The study of art: its run, its report, and the model used again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.art import judge, pictures
from experiments.art.config import Art
from experiments.art.training import DESCRIPTION, MODEL, Trainer, as_bytes, draw, painted
from experiments.common import ResumableRows, at_most, predictions, prepare, study
from jtl import tree
from jtl._files import write_file
from jtl.errors import InputError
from jtl.model import Model
from jtl.models.unet import UNetConfig, unet
from jtl.report import Result, Section, figures

ABOUT = """\
A small class-conditional U-Net learns digits of MNIST by flow matching (Lipman et al. 2023,
https://arxiv.org/abs/2210.02747), once for all seeds. ``transfer`` then learns a new style from ``--shots`` pictures of
each class. Each new class begins as the old class of its name plus a mark that all new classes share, and LoRA (Hu et
al. 2021, https://arxiv.org/abs/2106.09685) learns what the mark means. As many old pictures in every batch preserve the
old classes: the prior preservation of DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242, equation 2), with
real pictures in place of generated ones. ``scratch`` trains the same architecture from random weights on the same new
pictures, for as many updates; ``before`` is the pretrained model as it is; ``real`` are held-out pictures of the style,
the score of a perfect model. The default style is made: digits that pretraining never saw, printed in yellow over their
pink shadow, on dark blue. The style, the updates and the rates were chosen in trials of another seed, by these metrics.

``frechet`` and ``kernel`` are distances like FID and KID, but in the features of a small Conv4 that was trained on real
pictures of both styles. Few samples make ``frechet`` too large: compare it with ``real``, not with the literature. The
same network gives ``class_accuracy`` (it predicts the class that was asked for) and ``in_style`` (it takes a sample for
a new picture rather than an old one). ``diversity`` is the mean distance between two samples of a class, and
``held_out_loss`` the error of the velocity on other pictures of the style. With so few pictures longer training makes
both arms copy them, which no distance here punishes enough, so that both stop early."""
ARMS = ("transfer", "scratch")
BETTER = {"frechet": "less", "kernel": "less", "held_out_loss": "less", "class_accuracy": "more"}


def run(config: Art) -> Result:
    """Train, draw, measure and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "art")
    rows = ResumableRows(out, resume=config.resume)
    few = {"pretraining_updates": 60, "updates": 20, "sampling_steps": 4, "samples": 60, "seeds": 1}
    trainer = Trainer(at_most(config, **few) if config.quick else config)
    print(f"{trainer.pictures.origin}: {', '.join(trainer.pictures.classes)}")
    rows.get(trainer.pretraining, arm="pretraining", seed=config.seed)
    for arm in ("real", "before"):
        if arm == "before" or trainer.pictures.real is not None:
            rows.get(partial(trainer.measured, arm, config.seed), arm=arm, seed=config.seed)
    for seed in range(config.seed, config.seed + trainer.config.seeds):
        for arm in ARMS:
            row = rows.get(partial(trainer.measured, arm, seed), arm=arm, seed=seed)
            scores = "  ".join(f"{name} {row[name]:.3f}" for name in judge.METRICS)
            print(f"seed {seed}  {arm}  {scores}  {row['seconds']:.0f} s")

    return study.finish(
        "art", config, rows, _sections(trainer, rows), title="Art", about=ABOUT,
        metrics=(*judge.METRICS, "held_out_loss", "old_class_accuracy", "old_frechet"),
        notes=[f"New pictures: {trainer.pictures.origin}.", *trainer.pictures.notes],
    )  # fmt: skip


def predict(config: Art) -> None:
    """Generate pictures of a class with the model in ``config.out``; writes predictions.png there."""
    out, name = Path(config.out), config.predict
    assert name is not None
    about = json.loads(predictions.trained(out / DESCRIPTION).read_text(encoding="utf-8"))
    if name not in about["classes"]:
        raise InputError(f"--predict {name}: no class of this name; there are {', '.join(about['classes'])}")
    architecture = UNetConfig(**about["architecture"] | {"widths": tuple(about["architecture"]["widths"])})
    model = judge.restored(out / MODEL, unet(architecture, key=jax.random.key(0)))
    labels = np.full(config.count, about["classes"].index(name))
    drawn = as_bytes(draw(config, model, labels, config.seed))
    write_file(out / "predictions.png", figures.png(figures.strips({name: drawn})))
    print(f"{len(drawn)} pictures of {name}: {out / 'predictions.png'}")


# --- report ----------------------------------------------------------------------------------------


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    adapted = judge.restored(trainer.out / MODEL, trainer.start)
    few, _ = trainer.pictures.split(trainer.config.shots, trainer.config.seed)
    few = few.take(np.argsort(few.labels, kind="stable"))
    count = min(10, len(trainer.pictures.classes))
    shown = {"learned from": _by_class(as_bytes(pictures.pixels(few)), few.labels, 2, count)}
    for arm in ("real", "before", *ARMS):
        if (trainer.out / "samples" / f"{arm}.npz").exists():
            with np.load(trainer.out / "samples" / f"{arm}.npz") as kept:
                shown[arm] = _by_class(kept["image"], kept["label"], 4 if arm == "transfer" else 2, count)
    return [
        study.transferred_or_scratch(rows.rows, tuple(BETTER), BETTER),
        Section(
            "Samples",
            "Of the first seed, in the order in which they were generated, not selected; a column for each class.",
            figures.strips(shown, count),
        ),
        Section(
            "Interpolation",
            "By transfer. *noise*: on the great circle between the noise of two pictures of a class. *style*: between "
            "the pretrained and the adapted weights, in equal steps, from the same noise.",
            figures.strips(_interpolated(trainer, adapted)),
        ),
        Section(
            "Learning curves",
            "Mean squared error of the velocity, on training and on held-out pictures (for pretraining: old ones).",
            figures.learning_curves(rows.curves, "validation_loss", loss="training loss"),
        ),
    ]


def _by_class(images: np.ndarray, labels: np.ndarray, lines: int, classes: int) -> np.ndarray:
    """The first ``lines`` images of each of so many classes, a column a class."""
    places = [np.flatnonzero(labels == c) for c in np.unique(labels)[:classes]]
    return np.stack([images[own[min(i, len(own) - 1)]] for i in range(lines) for own in places])


def _interpolated(trainer: Trainer, adapted: Model, steps: int = 10) -> dict[str, np.ndarray]:
    """Strips between two noises of three classes, and between the weights before and after."""
    classes = [c % len(trainer.pictures.classes) for c in (3, 5, 8)]
    noise = np.asarray(jax.random.normal(jax.random.key(trainer.config.seed), (len(classes), 2, 28, 28, 3)))
    angle = np.linspace(0, np.pi / 2, steps)[:, None, None, None]
    # Two draws of so many numbers are all but orthogonal and of one length.
    path = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in noise])
    labels = trainer.first + np.repeat(classes, steps)
    drawn = as_bytes(painted(trainer.config, adapted, path, labels))
    rows = {
        f"noise, {trainer.pictures.classes[c]}": drawn[i * steps : (i + 1) * steps]
        for i, c in enumerate(classes)
    }
    own = np.arange(steps) % len(trainer.pictures.classes)
    start = np.asarray(jax.random.normal(jax.random.key(trainer.config.seed + 1), (steps, 28, 28, 3)))
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        model = adapted.with_params(tree.interpolate(trainer.start.params, adapted.params, weight))
        rows[f"style, {weight:.0%}"] = as_bytes(painted(trainer.config, model, start, trainer.first + own))
    return rows
