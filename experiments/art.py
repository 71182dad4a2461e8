"""Art: a new style from twenty pictures, by a small image model that was trained on other pictures.

A small class-conditional U-Net (``jtl.models.unet``) learns 3,500 digits of MNIST by flow matching (Lipman et al. 2023,
https://arxiv.org/abs/2210.02747), once for all seeds. ``transfer`` then learns a new style from two pictures a class:
new classes are the digits of their names with a mark that all share, and LoRA (Hu et al. 2022,
https://arxiv.org/abs/2106.09685) learns what the mark means, while as many old pictures in every batch keep the old
classes as they were: the prior preservation of DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242, equation
2), with real pictures in place of generated ones. ``scratch`` trains the same architecture from random weights on the
same pictures, for as many updates; ``before`` is the pre-trained model as it is; ``real`` are held-out pictures of the
style, what a perfect model would score.

    python -m experiments.art --out runs/art

Expected (``experiments/results/art.json``, three seeds, 20 minutes of one shared core): ``frechet`` 14.1 ± 4.5
(``transfer``), 29.0 ± 1.9 (``scratch``), 0.5 of real pictures; ``class_accuracy`` 0.945 ± 0.063 and 0.536 ± 0.241;
``held_out_loss`` 0.134 ± 0.014 and 0.164 ± 0.020. ``transfer`` is better outside the intervals in all three, and draws
the old digits as before, but its pictures of a class are more alike than real ones (``diversity`` 3.3 ± 0.3, 5.5).

The adapted model lies in ``OUT``; it draws new pictures of a class:

    python -m experiments.art --out runs/art --predict 7

The style is made: digits that pre-training never saw, printed in yellow over their pink shadow, on dark blue
(``jtl.data.shift.printed``). Other pictures: ``--data rendered_digits`` (digits set in type), ``--data tfds:NAME``, a
folder of about twenty pictures, or one with a folder for each class. All become 28 x 28 pixels in colour.

``frechet`` and ``kernel`` are distances as FID and KID are, but of the 32 features of a Conv4 that was trained on real
pictures of both styles, 20 classes of them; it also names the class of each sample and says whether it is in the style.
A few hundred samples make ``frechet`` too large: beside ``real`` it can be read, beside the literature it cannot.
``diversity`` is the mean distance of two samples of a class; ``held_out_loss`` the error of the velocity on a hundred
other pictures of the style. Two pictures a class are few: the more updates, the more do both arms draw copies of them,
which no distance punishes enough. So both are stopped early: in a trial ``scratch`` after 300 updates in place of 150
drew good copies, as near to the real pictures as ``transfer`` (``frechet`` 13 and 14, of 100 samples), but its held-out
loss was 0.172 and that of ``transfer`` 0.139. The style, the updates and the rates were set in trials of another seed
that showed these metrics.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import art_pictures as pictures
from experiments.application import transferred_or_scratch
from experiments.cli import cli
from experiments.ledger import Ledger
from experiments.output import Config, command, prepare, settings
from jtl import adapters, finetune, tree
from jtl.data import Mixed
from jtl.data.image import Images
from jtl.data.loader import Batches, loader
from jtl.files import write_file
from jtl.model import Model
from jtl.models.unet import UNetConfig, example, unet, with_classes
from jtl.tasks import FlowMatching
from jtl.tasks.flow_matching import noised, sample, without_noise
from jtl.train import LEAN_ON_CPU, Checkpoints, Fitted, adamw, figures, fit, make_step, schedule
from jtl.train.report import Result, Section, environment, summarise, write_report, write_result

ARMS = ("transfer", "scratch")
# Peaks of AdamW, tried on another seed: 3e-3, 1e-2 and 2e-2 for transfer, 2e-3 and 5e-3 for scratch.
RATES = {"pretraining": 2e-3, "transfer": 1e-2, "scratch": 2e-3}
# All dense and convolutional layers but those that read the class alone: they would learn a class's few pictures.
LAYERS = r"(?!label|.*norm|.*modulation).*"
ABOUT, MODEL, PRETRAINED = "about.json", "model.npz", "pretrained.npz"  # in --out
SMALL = UNetConfig(patch_size=4, widths=(16,), num_attention_heads=2, condition_size=32)
TIMES = (-1.0, 1.0)  # a digit is all but settled at t = 0.4
POWER = 1.5  # of the times of sampling
ROWS = 100  # pictures that are drawn at once
BETTER = {"frechet": "less", "kernel": "less", "held_out_loss": "less", "class_accuracy": "more"}


@dataclass(frozen=True, kw_only=True)
class Art(Config):
    """Settings of the application."""

    data: str = "poster"
    """The new style: poster, rendered_digits, tfds:NAME, a folder of pictures, or a folder of them for each class."""
    shots: int = 2
    """Pictures of each class to learn from; a folder without train/ is taken whole."""
    pretraining_updates: int = 2000
    """Updates of the pre-training, of 64 old pictures each."""
    updates: int = 150
    """Updates of transfer and of scratch."""
    batch_size: int = 20
    """New pictures of an update, and old ones beside them."""
    rank: int = 8
    """Of LoRA."""
    guidance: float = 2.0
    """Strength of classifier-free guidance: 1 is none."""
    sampling_steps: int = 12
    """Steps of Heun's method from noise to a picture, two forwards each."""
    samples: int = 500
    """Pictures that each arm draws to be measured; at most half of the test pictures."""
    seeds: int = 3
    """Repetitions: other pictures to learn from, adapters, orders and noise. The pre-training is one for all."""
    count: int = 40
    """Pictures that --predict draws."""
    predict: str | None = None
    """A class, of which the model that an earlier run left in --out draws new pictures."""


def run(config: Art) -> Result:
    """Train, draw, measure and report; writes into ``config.out`` and returns the result."""
    check(config)
    out = prepare(config, "art")
    ledger = Ledger(out, resume=config.resume)
    studio = Studio(shortened(config) if config.quick else config)
    print(f"{studio.pictures.origin}: {', '.join(studio.pictures.classes)}")
    ledger.get(studio.pretraining, arm="pretraining", seed=config.seed)
    for arm in ("real", "before"):
        if arm == "before" or studio.pictures.real is not None:
            ledger.get(partial(studio.measured, arm, config.seed), arm=arm, seed=config.seed)
    for seed in range(config.seed, config.seed + studio.config.seeds):
        for arm in ARMS:
            row = ledger.get(partial(studio.measured, arm, seed), arm=arm, seed=seed)
            scores = "  ".join(f"{name} {row[name]:.3f}" for name in pictures.METRICS)
            print(f"seed {seed}  {arm}  {scores}  {row['seconds']:.0f} s")

    metrics = [*pictures.METRICS, "held_out_loss", "old_class_accuracy", "old_frechet", "seconds"]
    summary = summarise(ledger.rows, metrics)
    result = Result("art", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Art",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("art", config),
        sections=_sections(studio, ledger),
        notes=[f"New pictures: {studio.pictures.origin}.", *studio.pictures.notes],
    )
    return result


def check(config: Art) -> None:
    """Raise ValueError for settings that make no sense, before anything is loaded."""
    names = ("shots", "pretraining_updates", "updates", "batch_size", "rank", "sampling_steps", "count")
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.samples < 20:
        raise ValueError(f"--samples must be at least 20, which a covariance needs, got {config.samples}")


def shortened(config: Art) -> Art:
    """The settings of ``--quick``, whose network is ``SMALL``: its pictures are noise with some structure."""
    few = {"pretraining_updates": 60, "updates": 20, "sampling_steps": 4, "samples": 60, "seeds": 1}
    return replace(config, **{name: min(most, getattr(config, name)) for name, most in few.items()})


class Studio:
    """The pictures, the models, and what they draw."""

    def __init__(self, config: Art) -> None:
        self.config, self.out = config, Path(config.out)
        self.pictures = pictures.load_pictures(config.data, config.samples)
        self.first = len(self.pictures.old_classes)
        self.architecture = replace(SMALL if config.quick else UNetConfig(), num_classes=self.first)

    # --- models ---

    def pretraining(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row and the learning curve of the pre-training; stores its model."""
        updates = self.config.pretraining_updates
        model = noised(unet(self.architecture, key=jax.random.key(0)), times=TIMES)
        step = make_step(
            FlowMatching(), adamw(schedule(RATES["pretraining"], updates, decay="cosine"), b2=0.99)
        )
        size = min(64, len(self.pictures.old))
        fitted = self._fit(
            step, model, Batches(self.pictures.old, size, epochs=-(-updates // (len(self.pictures.old) // size))),
            self.pictures.old_test, updates, 0, Checkpoints(self.out / "pretraining" / "checkpoints", keep=1),
        )  # fmt: skip
        pictures.keep(self.out / PRETRAINED, without_noise(fitted.state.model))
        row = {
            "steps": updates,
            "learning_rate": RATES["pretraining"],
            "seconds": fitted.history[-1]["seconds"],
        }
        return {**row, "trained_parameters": tree.size(model.params)}, fitted.history

    @cached_property
    def pretrained(self) -> Model:
        """The model of the pre-training."""
        return pictures.kept(self.out / PRETRAINED, unet(self.architecture, key=jax.random.key(0)))

    @cached_property
    def start(self) -> Model:
        """The pre-trained model with the new classes, marked, before they are learned."""
        return with_classes(self.pretrained, self.pictures.like, key=jax.random.key(0))

    @cached_property
    def judge(self) -> Model:
        """The network that the metrics ask."""
        return pictures.judge(self.pictures, self.out / "judge.npz", 40 if self.config.quick else 300)

    def trained(self, arm: str, seed: int) -> tuple[Model, Fitted]:
        """The model of an arm, plain, and its training."""
        config, updates = self.config, self.config.updates
        few, others = self.pictures.split(config.shots, seed)
        init_key = jax.random.key(seed)
        size = min(config.batch_size, len(few))
        new = Batches(few, size, seed=seed, epochs=-(-updates // (len(few) // size)))
        if arm == "scratch":
            model, labels, batches, options = unet(self.start.config, key=init_key), None, new, None
        else:
            model = adapters.lora(
                self.start, rank=config.rank, where=LAYERS, key=init_key, batch=example(self.start.config)
            )
            labels = finetune.train_only(model, ".*/lora/.*")
            old = self.pictures.old
            prior = Batches(old, size, seed=seed, epochs=-(-updates // (len(old) // size)))
            # One loss over both kinds of rows, in equal parts: the paper's with λ = 1, halved.
            batches = Mixed([new, prior], hide_labels=False)
            options = LEAN_ON_CPU if jax.default_backend() == "cpu" else None
        rate = adamw(schedule(RATES[arm], updates), b2=0.99)
        step = make_step(FlowMatching(), rate, labels, compiler_options=options)
        fitted = self._fit(step, noised(model, times=TIMES), batches, others, updates, seed)
        plain = without_noise(fitted.state.model)
        return (plain if arm == "scratch" else adapters.merge(plain)), fitted

    def _fit(
        self,
        step: Any,
        model: Model,
        batches: Any,
        held_out: Images,
        updates: int,
        seed: int,
        checkpoints: Any = None,
    ) -> Fitted:
        """Train for all ``updates``; validation is for looking alone, and chooses nothing."""
        size = min(100, len(held_out))
        batch = held_out.batch(np.arange(size))
        return fit(
            step,
            step.init(model, jax.random.fold_in(jax.random.key(seed), 1)),
            loader(batches),
            steps=updates,
            validate=lambda model: {"loss": float(_loss(FlowMatching(), model, batch))},
            validate_every=-(-updates // (2 if self.config.quick else 6)),
            metric="loss",
            mode="min",
            checkpoints=checkpoints,
            resume=checkpoints is not None and self.config.resume,
        )

    # --- drawing and measuring ---

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm and its learning curve; keeps what the first seed draws."""
        began, history, row = time.monotonic(), [], {}
        labels = np.asarray(self.pictures.reference.labels)
        if arm == "real":
            drawn, labels = pictures.pixels(self.pictures.real), np.asarray(self.pictures.real.labels)
        else:
            # Of the same structure as all others: one program draws for all.
            model = with_classes(self.pretrained, self.pictures.like, key=jax.random.key(0), apart=0.0)
            if arm != "before":
                model, fitted = self.trained(arm, seed)
                history = fitted.history
                row = {"steps": self.config.updates, "learning_rate": RATES[arm]}
                row["held_out_loss"] = history[-1]["validation_loss"]
                row["trained_parameters"] = tree.size(fitted.state.trained)
            drawn = draw(self.config, model, labels, seed)
            if arm != "scratch":
                row |= self._old(model, seed)
        row |= pictures.measured(
            self.judge, drawn, labels, pictures.pixels(self.pictures.reference), self.first
        )
        if seed == self.config.seed:
            (self.out / "samples").mkdir(exist_ok=True)
            write_file(
                self.out / "samples" / f"{arm}.npz",
                lambda file: np.savez(file, image=as_bytes(drawn), label=labels),
            )
            if arm == "transfer":
                self._keep(model)
        return {**row, "seconds": time.monotonic() - began}, history

    def _old(self, model: Model, seed: int) -> dict[str, float]:
        """How the old classes fare, on fewer pictures."""
        test = self.pictures.old_test
        test = test.take(np.arange(min(len(test), max(20, 2 * self.config.samples // 5))))
        labels = np.asarray(test.labels)
        drawn = draw(self.config, model, labels, seed)
        found = pictures.measured(self.judge, drawn, labels, pictures.pixels(test), self.first)
        return {f"old_{name}": found[name] for name in ("class_accuracy", "frechet")}

    def _keep(self, model: Model) -> None:
        pictures.keep(self.out / MODEL, model)
        about = {
            "architecture": asdict(model.config),
            "classes": [*(f"{pictures.OLD}/{c}" for c in self.pictures.old_classes), *self.pictures.classes],
        }
        write_file(self.out / ABOUT, json.dumps(about))


def draw(config: Art, model: Model, labels: np.ndarray, seed: int) -> np.ndarray:
    """A picture of each of the classes ``labels``, -1 to 1: float32 (N, 28, 28, 3)."""
    key, found = jax.random.fold_in(jax.random.key(seed), 2), []
    for i in range(0, len(labels), ROWS):
        own = labels[i : i + ROWS]
        noise = jax.random.normal(jax.random.fold_in(key, i), (ROWS, 28, 28, 3))
        found.append(painted(config, model, noise[: len(own)], own))
    return np.concatenate(found)


def painted(config: Art, model: Model, noise: Any, labels: np.ndarray) -> np.ndarray:
    """The pictures that at most ``ROWS`` noises become, in whole grey levels as real ones are."""
    whole = np.resize(noise, (ROWS, *noise.shape[1:])), np.resize(labels, ROWS)  # one shape, one program
    images = sample(
        model, *map(jnp.asarray, whole), steps=config.sampling_steps, guidance=config.guidance, power=POWER
    )
    return as_bytes(np.asarray(images))[: len(labels)] / np.float32(127.5) - 1


@jax.jit
def _loss(loss: Any, model: Model, batch: Any) -> jax.Array:
    return loss(model, batch, jax.random.key(0))[0]


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures of -1 to 1 in 256 levels."""
    return np.rint(127.5 * (np.clip(images, -1, 1) + 1)).astype(np.uint8)


# --- use again -------------------------------------------------------------------------------------


def draw_more(config: Art, name: str) -> None:
    """Draw pictures of the class ``name`` by the model in ``config.out``; writes predictions.png there."""
    out = Path(config.out)
    if not (out / ABOUT).is_file():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {out} holds none: run without --predict first"
        )
    about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
    if name not in about["classes"]:
        raise ValueError(f"--predict {name}: no class of this name; there are {', '.join(about['classes'])}")
    check(config)
    architecture = UNetConfig(**about["architecture"] | {"widths": tuple(about["architecture"]["widths"])})
    model = pictures.kept(out / MODEL, unet(architecture, key=jax.random.key(0)))
    labels = np.full(config.count, about["classes"].index(name))
    drawn = as_bytes(draw(config, model, labels, config.seed))
    write_file(out / "predictions.png", figures.png(figures.strips({name: drawn})))
    print(f"{len(drawn)} pictures of {name}: {out / 'predictions.png'}")


# --- report ----------------------------------------------------------------------------------------


def _sections(studio: Studio, ledger: Ledger) -> list[Section]:
    adapted = pictures.kept(studio.out / MODEL, studio.start)
    few, _ = studio.pictures.split(studio.config.shots, studio.config.seed)
    few = few.take(np.argsort(few.labels, kind="stable"))
    count = min(10, len(studio.pictures.classes))
    rows = {"learned from": _by_class(as_bytes(pictures.pixels(few)), few.labels, 2, count)}
    for arm in ("real", "before", *ARMS):
        if (studio.out / "samples" / f"{arm}.npz").exists():
            with np.load(studio.out / "samples" / f"{arm}.npz") as kept:
                rows[arm] = _by_class(kept["image"], kept["label"], 4 if arm == "transfer" else 2, count)
    return [
        transferred_or_scratch(ledger.rows, tuple(BETTER), BETTER),
        Section(
            "Samples",
            "Of the first seed, in the order in which they were drawn, not chosen; a column a class.",
            figures.strips(rows, count),
        ),
        Section(
            "Interpolation",
            "By transfer. *noise*: on the great circle between the noises of two pictures of a class. *style*: from "
            "the pre-trained weights to the adapted ones, in equal steps, of the same noise.",
            figures.strips(_interpolated(studio, adapted)),
        ),
        Section(
            "Learning curves",
            "Mean squared error of the velocity, on training and on held-out pictures (of pre-training: old ones).",
            figures.learning_curves(ledger.curves, "validation_loss", loss="training loss"),
        ),
    ]


def _by_class(images: np.ndarray, labels: np.ndarray, lines: int, classes: int) -> np.ndarray:
    """The first ``lines`` images of each of so many classes, a column a class."""
    places = [np.flatnonzero(labels == c) for c in np.unique(labels)[:classes]]
    return np.stack([images[own[min(i, len(own) - 1)]] for i in range(lines) for own in places])


def _interpolated(studio: Studio, adapted: Model, steps: int = 10) -> dict[str, np.ndarray]:
    """Strips between two noises of three classes, and between the weights before and after."""
    classes = [c % len(studio.pictures.classes) for c in (3, 5, 8)]
    noise = np.asarray(jax.random.normal(jax.random.key(studio.config.seed), (len(classes), 2, 28, 28, 3)))
    angle = np.linspace(0, np.pi / 2, steps)[:, None, None, None]
    # Two draws of so many numbers are all but orthogonal and of one length.
    path = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in noise])
    labels = studio.first + np.repeat(classes, steps)
    drawn = as_bytes(painted(studio.config, adapted, path, labels))
    rows = {
        f"noise, {studio.pictures.classes[c]}": drawn[i * steps : (i + 1) * steps]
        for i, c in enumerate(classes)
    }
    own = np.arange(steps) % len(studio.pictures.classes)
    start = np.asarray(jax.random.normal(jax.random.key(studio.config.seed + 1), (steps, 28, 28, 3)))
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        model = adapted.with_params(tree.interpolate(studio.start.params, adapted.params, weight))
        rows[f"style, {weight:.0%}"] = as_bytes(painted(studio.config, model, start, studio.first + own))
    return rows


def main(config: Art) -> Result | None:
    """Train; or draw with what was trained."""
    if config.predict is None:
        return run(config)
    draw_more(config, config.predict)
    return None


if __name__ == "__main__":
    cli(main, Art)
