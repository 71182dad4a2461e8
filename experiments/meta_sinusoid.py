"""MAML on sinusoids (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.1).

A task is y = A sin(x − φ), A in [0.1, 5], φ in [0, π], seen at K = 10 points of [−5, 5]. A network of two hidden layers
of 40 is meta-trained with one inner step of rate 0.01, 25 tasks an update, Adam at 1e-3. Beside it the paper's
baseline: the same network trained on all tasks at once and fine-tuned on the K points, its rate chosen on other tasks,
one for a single step and one for more. ``maml_1`` is the mean squared error after one step on K points of a new task,
over 600 tasks.

    python -m experiments.meta_sinusoid --out runs/meta_sinusoid

Expected, three training seeds, under three minutes on two cores (``experiments/results/meta_sinusoid.json``):
``maml_1`` 0.341 ± 0.016, ``maml_10`` 0.108 ± 0.029, ``pretrained_1`` 2.348 ± 0.051, ``pretrained_10``
1.480 ± 0.074, intervals over seeds. The paper's figures show MAML far below the baseline after one step, and improving
up to ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.command_line import main
from experiments.common.device_loop import train
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import meta
from jtl.data.batches.episodes import sinusoids
from jtl.errors import InputError
from jtl.loss import Aux
from jtl.model import Batch, Model, linen
from jtl.models.mlp import MLP
from jtl.report.report import Result, Section, environment, estimate, summarise, write_report, write_result
from jtl.train import make_step

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the baseline's fine-tuning, tried on tasks of their own
SHOWN = (0, 1, 10)
BLOCK = 500


@dataclass(frozen=True, kw_only=True)
class MetaSinusoid(Config):
    """Settings of the comparison."""

    iterations: int = 70_000
    """Updates of each network."""
    tasks: int = 25
    """Tasks an update."""
    shots: int = 10
    """Points of a task to adapt on, and as many to judge by in training: K."""
    inner_rate: float = 0.01
    """Rate of MAML's inner steps."""
    inner_steps: int = 1
    """MAML's inner steps in training."""
    first_order: bool = False
    """Leave out second derivatives."""
    test_tasks: int = 600
    """New tasks to test on."""
    seeds: int = 3
    """Repetitions, from other starts on other tasks."""


def squared_error(model: Model, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """The mean squared error."""
    error = model({"x": batch["x"]})["prediction"] - batch["y"]  # type: ignore[index]
    return jnp.mean(jnp.square(error)), Aux({}, {})


def run(config: MetaSinusoid) -> Result:
    """Train both networks and test them; writes into ``config.out`` and returns the result."""
    if config.iterations < 1 or config.iterations % BLOCK:
        raise InputError(f"--iterations must be a multiple of {BLOCK}, got {config.iterations}")
    out = prepare(config, "meta_sinusoid")
    ledger = ResumableRows(out, resume=config.resume)
    iterations = 2000 if config.quick else config.iterations
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        for arm in ("maml", "pretrained"):
            row = ledger.get(
                lambda arm=arm, seed=seed: _arm(config, arm, seed, iterations), arm=arm, seed=seed
            )  # type: ignore[misc]
            print(f"seed {seed} {arm}:", [round(float(np.mean(row["mse"][step])), 3) for step in SHOWN])

    rows = [
        {
            "arm": f"{row['arm']}_{step}", "seed": row["seed"], "mse": float(np.mean(row["mse"][step])),
            "ci95_over_tasks": estimate(row["mse"][step])["ci95"], "rate": row["rates"][SHOWN.index(step)],
        }
        for row in ledger.rows
        for step in SHOWN
    ]  # fmt: skip
    summary = summarise(rows, ["mse"])
    result = Result("meta_sinusoid", settings(config), environment(), ledger.seconds, rows, summary)
    write_result(out, result)
    ratio = summary["mse"]["pretrained_1"]["mean"] / summary["mse"]["maml_1"]["mean"]
    write_report(
        out,
        result,
        title="MAML on sinusoids",
        about=f"{iterations:,} updates; mean squared error on {config.test_tasks} new tasks, K = {config.shots}; "
        f"the rows of the result have each seed's interval over its tasks. After one step the baseline's error is "
        f"{ratio:.1f} times MAML's.",
        command=command("meta_sinusoid", config),
        sections=[
            Section(
                "Error by inner steps",
                "Band: ± 95 % interval over the tasks of all seeds.",
                _curves(ledger.rows),
            ),
            Section("Fits of one task", "Dots: the K points.", _fits(ledger.rows)),
        ],
    )
    return result


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

    model, curve = train(
        step, model, batch, None, draw, updates=iterations, block=BLOCK, report=10_000
    )  # fmt: skip
    curve = [{"step": point["step"], "loss": point["loss"], "arm": arm} for point in curve]

    unseen = lambda key: sinusoids(key, tasks=config.test_tasks, shots=config.shots, queries=100)  # noqa: E731

    def tested(rate: float, steps: int, key: jax.Array) -> np.ndarray:
        evaluate = meta.make_evaluate(squared_error, steps=steps, rate=rate)
        return evaluate(model, unseen(key), key)["loss"].T

    def validated(rate: float, steps: int) -> float:
        try:
            return float(tested(rate, steps, validation)[-1].mean())
        except meta.Diverged:
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
    return {"mse": mse, "rates": rates, "fit": fit}, curve


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
