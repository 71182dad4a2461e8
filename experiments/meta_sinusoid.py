"""MAML on sinusoids (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.1).

A network learns to adapt to a new sinusoid from few of its points by gradient steps. Beside MAML stands the paper's
baseline: the same network trained on all tasks at once (``pretrained``) and fine-tuned on the points.

    python -m experiments.meta_sinusoid --out runs/meta_sinusoid
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare
from experiments.common.device_loop import train
from jtl import meta
from jtl.data.batches.episodes import sinusoids
from jtl.errors import Diverged, InputError
from jtl.loss import Aux
from jtl.model import Batch, Model, linen
from jtl.models.mlp import MLP
from jtl.report import Result, Section, estimate, summarise
from jtl.train import make_step

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the baseline's fine-tuning, tried on tasks of their own
SHOWN = (0, 1, 10)
BLOCK = 500
ABOUT = (
    "A task is y = A sin(x - φ), A in [0.1, 5], φ in [0, π], seen at K points of [-5, 5]. A network of two hidden "
    "layers of 40 is meta-trained by MAML (`maml`) with Adam at 1e-3. `pretrained` is the paper's baseline: the same "
    "network trained on all tasks at once and fine-tuned on the K points, its rate chosen on other tasks, one for a "
    "single step and one for more. `maml_1` is the mean squared error on new tasks after one step. "
)


@dataclass(frozen=True, kw_only=True)
class MetaSinusoid(Config):
    """Settings of the comparison."""

    iterations: int = at_least(1, 70_000)
    """Updates of each network."""
    tasks: int = at_least(1, 25)
    """Tasks an update."""
    shots: int = at_least(1, 10)
    """Points of a task to adapt on, and as many to judge by in training: K."""
    inner_rate: float = above(0, 0.01)
    """Rate of MAML's inner steps."""
    inner_steps: int = at_least(1, 1)
    """MAML's inner steps in training."""
    first_order: bool = False
    """Leave out second derivatives."""
    test_tasks: int = at_least(2, 600)
    """New tasks to test on."""
    seeds: int = at_least(1, 3)
    """Repetitions, from other starts on other tasks."""


def squared_error(model: Model, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """The mean squared error."""
    error = model({"x": batch["x"]})["prediction"] - batch["y"]  # type: ignore[index]
    return jnp.mean(jnp.square(error)), Aux({}, {})


def run(config: MetaSinusoid) -> Result:
    """Train both networks and test them; writes into ``config.out`` and returns the result."""
    if config.iterations % BLOCK:
        raise InputError(f"--iterations must be a multiple of {BLOCK}, got {config.iterations}")
    rows = ResumableRows(prepare(config, "meta_sinusoid"), resume=config.resume)
    iterations = 2000 if config.quick else config.iterations
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        for arm in ("maml", "pretrained"):
            row = rows.get(partial(_arm, config, arm, seed, iterations), arm=arm, seed=seed)
            print(f"seed {seed} {arm}:", [round(float(np.mean(row["mse"][step])), 3) for step in SHOWN])

    found = [
        {
            "arm": f"{row['arm']}_{step}", "seed": row["seed"], "mse": float(np.mean(row["mse"][step])),
            "ci95_over_tasks": estimate(row["mse"][step])["ci95"], "rate": row["rates"][SHOWN.index(step)],
        }
        for row in rows.rows
        for step in SHOWN
    ]  # fmt: skip
    summary = summarise(found, ["mse"])
    ratio = summary["mse"]["pretrained_1"]["mean"] / summary["mse"]["maml_1"]["mean"]
    band = "Band: ± 95 % interval over the tasks of all seeds."
    return finish(
        "meta_sinusoid",
        config,
        found,
        [
            Section("Error by inner steps", band, _curves(rows.rows)),
            Section("Fits of one task", "Dots: the K points.", _fits(rows.rows)),
        ],
        title="MAML on sinusoids",
        about=f"{ABOUT}{iterations:,} updates of {config.tasks} tasks, tested on {config.test_tasks} new ones; "
        f"K = {config.shots}. The rows of the result have each seed's interval over its tasks. After one step the "
        f"baseline's error is {ratio:.1f} times MAML's.",
        summary=summary,
        seconds=rows.seconds,
    )


def _arm(config: MetaSinusoid, arm: str, seed: int, iterations: int) -> tuple[dict[str, Any], list[Any]]:
    start, draw, validation, test = jax.random.split(jax.random.key(seed), 4)
    module = MLP(hidden=(40, 40), outputs=1)
    model = linen(module, module.init(start, jnp.zeros((1, 1))))
    inner = meta.maml(steps=config.inner_steps, rate=config.inner_rate, first_order=config.first_order)
    options = {"gradient": inner} if arm == "maml" else {}
    step = make_step(squared_error, optax.adam(1e-3), **options)

    def batch(_: None, key: jax.Array) -> Any:
        episodes = sinusoids(key, tasks=config.tasks, shots=config.shots, queries=config.shots)
        if arm == "maml":
            return episodes
        both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), episodes["support"], episodes["query"])
        return jax.tree.map(lambda x: x.reshape(-1, 1), both)

    model, curve = train(step, model, batch, None, draw, updates=iterations, block=BLOCK, report=10_000)
    learned = [{"step": point["step"], "loss": point["loss"], "arm": arm} for point in curve]

    def tested(rate: float, steps: int, key: jax.Array) -> np.ndarray:
        evaluate = meta.make_evaluate(squared_error, steps=steps, rate=rate)
        new = sinusoids(key, tasks=config.test_tasks, shots=config.shots, queries=100)
        return evaluate(model, new, key)["loss"].T

    def validated(rate: float, steps: int) -> float:
        try:
            return float(tested(rate, steps, validation)[-1].mean())
        except Diverged:
            return float("inf")

    once = many = config.inner_rate
    if arm == "pretrained":
        once = min(RATES, key=lambda rate: validated(rate, 1))
        many = min(RATES, key=lambda rate: validated(rate, max(SHOWN)))
    mse = [*tested(once, 1, test), *tested(many, max(SHOWN), test)[2:]]
    rates = (once, once, many)

    one = jax.tree.map(lambda x: x[0], sinusoids(test, tasks=1, shots=config.shots, queries=1))
    grid = jnp.linspace(-5, 5, 101)[:, None]
    lines = []
    for steps, rate in zip(SHOWN, rates, strict=True):
        own = model
        if steps:
            on = lambda params, batch, key: squared_error(model.with_params(params), batch, key)  # noqa: E731
            own = model.with_params(
                meta.adapt(on, model.params, one["support"], test, steps=steps, rate=rate)
            )
        lines.append(own({"x": grid})["prediction"][:, 0].tolist())
    fit = {
        "x": grid[:, 0].tolist(),
        "lines": lines,
        "points": [one["support"][name][:, 0].tolist() for name in "xy"],
    }
    return {"mse": mse, "rates": rates, "fit": fit}, learned


def _curves(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mse = np.concatenate([row["mse"] for row in rows if row["arm"] == arm], 1)
        mean, half = mse.mean(1), 1.96 * mse.std(1, ddof=1) / mse.shape[1] ** 0.5
        steps = np.arange(len(mean))
        axes.plot(steps, mean, marker="o", label=arm)
        axes.fill_between(steps, mean - half, mean + half, alpha=0.2)
    axes.set(xlabel="inner steps", ylabel="mean squared error", yscale="log")
    axes.legend()
    return figure


def _fits(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    arms = {row["arm"]: row["fit"] for row in rows}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (arm, fit) in zip(figure.subplots(1, len(arms), sharey=True), arms.items(), strict=True):
        for steps, line in zip(SHOWN, fit["lines"], strict=True):
            axes.plot(fit["x"], line, label=f"{steps} steps")
        axes.plot(*fit["points"], "k.", markersize=9)
        axes.set(title=arm, xlabel="x", ylabel="y")
        axes.legend()
    return figure


if __name__ == "__main__":
    main(run, MetaSinusoid)
