"""Merging: one model out of several that were fine-tuned from the same start, without any training.

*soup*: members fine-tuned on one task from one start, the pretrained body under a probe's head, with other learning
rates and orders of examples, against what they become together: the uniform and the greedy soup (Wortsman et al.
2022, 2203.05482), the Fisher-weighted average (Matena and Raffel 2022, 2111.09832), the arc between the two best
(``slerp``) and the line from the start to the best (``wise_ft``, Wortsman et al. 2022, 2109.01903), of which the whole
curve is drawn. ``best`` is the member that validated best, ``member`` the mean of all.

*tasks*: one model for each of two tasks, merged into one body that serves both, each task with its own head: the
average, task arithmetic (Ilharco et al. 2023, 2212.04089), TIES (Yadav et al. 2023, 2306.01708), DARE (Yu et al. 2024,
2311.03099), Fisher and RegMean (Jin et al. 2023, 2212.09849). ``alone`` is each task's own model, ``start`` the
pretrained body under those heads.

    python -m experiments.merge --out runs/merge

Every weight that a method needs is chosen on validation; the test split is used once for each arm.

Expected, three seeds (``experiments/results/merge.json``; about 25 minutes on a quiet core): of the soup ``member``
0.744 ± 0.012, ``uniform_soup`` and ``greedy_soup`` 0.751 ± 0.030 and 0.035, ``fisher`` 0.757 ± 0.029; of the tasks
``alone`` 0.613 ± 0.023, ``start`` 0.386 ± 0.031, ``average`` 0.557 ± 0.029, ``fisher`` 0.604 ± 0.023, the others
between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.common import techniques
from experiments.common.classification import Classification, prepare_classification, score
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import finetune, merging, tree
from jtl.data.batches.loader import Batches
from jtl.errors import InputError
from jtl.model import Model
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    format_estimate,
    paired_difference,
    summarise,
    table,
    write_report,
    write_result,
)

WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)  # tried on validation
CURVE = tuple(np.linspace(0, 1, 11).round(1).tolist())


@dataclass(frozen=True, kw_only=True)
class Merge(Config):
    """Settings of the comparison."""

    model: str = "minilm"
    """As for experiments.finetune."""
    data: str = "rotten_tomatoes"
    """The task of the soup, and the first of the two tasks."""
    other_data: str = "newsgroups20"
    """The second task."""
    image_size: int | None = None
    """Side of images in pixels; left out, that of the model."""
    max_length: int = 64
    """Longest text in tokens; the rest is cut off."""
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    """Peak learning rates, one for each member of the soup."""
    train_examples: int = 1024
    """Labelled training examples of each task."""
    batch_size: int = 32
    """Examples an update."""
    test_examples: int = 1000
    """Test examples of each task."""
    seeds: int = 3
    """Repetitions: other starts of the head, other examples."""


def run(config: Merge) -> Result:
    """Fine-tune and merge; writes into ``config.out`` and returns the result."""
    if len(config.rates) < 2:
        raise InputError(f"--rates needs at least two members to merge, got {config.rates}")
    out = prepare(config, "merge")
    ledger = ResumableRows(out, resume=config.resume)
    quick = config.quick
    first, second = (
        prepare_classification(
            config.model,
            name,
            max_length=config.max_length,
            image_size=config.image_size,
            validation=60 if quick else 500,
            test=60 if quick else config.test_examples or None,
            quick=quick,
        )
        for name in (config.data, config.other_data)
    )
    count = 128 if quick else config.train_examples or None
    budget = techniques.Budget(
        epochs=1, min_steps=4 if quick else 30, batch_size=config.batch_size, validations=1
    )
    rates = config.rates[:2] if quick else config.rates

    for seed in range(config.seed, config.seed + (1 if quick else config.seeds)):
        one, two = first.with_train(count, seed), second.with_train(count, seed)

        def merged(one: Classification = one, two: Classification = two, seed: int = seed) -> Any:
            start = techniques.start(one, "lp_ft", jax.random.key(seed), on="features")
            members = [
                techniques.run_arm(
                    one, "full", seed=seed + 1000 * i, budget=budget, rate=rate, model=start
                ).model
                for i, rate in enumerate(rates)
            ]
            rows, curve = soup(one, start, members)
            other = techniques.run_arm(two, "full", seed=seed, budget=budget, on="features").model
            usual = members[
                min(
                    range(len(rates)),
                    key=lambda i: abs(rates[i] - techniques.usual_rate("full", one.dataset.kind)),
                )
            ]
            return {"soup": rows, "tasks": tasks((one, two), start, (usual, other))}, curve

        row = ledger.get(merged, seed=seed)
        print(
            f"seed {seed}",
            {part: {a: round(v, 3) for a, v in row[part].items()} for part in ("soup", "tasks")},
        )

    rows = [
        {"part": part, "arm": arm, "seed": row["seed"], "accuracy": value}
        for row in ledger.rows
        for part in ("soup", "tasks")
        for arm, value in row[part].items()
    ]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("soup", "tasks")}
    summary = {f"accuracy_{part}": summarise(own, ["accuracy"])["accuracy"] for part, own in parts.items()}
    result = Result("merge", settings(config), environment(), ledger.seconds, rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title=f"Merging models of {config.model}",
        about=f"{len(rates)} members fine-tuned on `{config.data}`, and one on `{config.other_data}`, "
        f"{count:,} examples each; accuracies on test, that of *tasks* the mean over both.",
        command=command("merge", config),
        sections=[
            _against(parts["soup"], "member", "Soup"),
            _against(parts["tasks"], "alone", "Tasks"),
            Section(
                "From the start to the best member",
                "Test accuracy along the line between the two (WiSE-FT).",
                figures.over_weights(ledger.curves, "accuracy"),
            ),
        ],
    )
    return result


def _against(rows: list[dict[str, Any]], base: str, title: str) -> Section:
    names = dict.fromkeys(row["arm"] for row in rows)
    found = summarise(rows, ["accuracy"])["accuracy"]
    lines = [
        [arm, format_estimate(found[arm]), format_estimate(paired_difference(rows, "accuracy", arm, base))]
        for arm in names
    ]
    return Section(title, table(["arm", "accuracy", f"less {base}"], lines))


def soup(
    task: Classification, start: Model, members: list[Model]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Test accuracy of the members and of what they make together; and along the line from the start to the best."""

    def validated(params: PyTree) -> float:
        return score(start.with_params(params), task)

    params = [member.params for member in members]
    alone = [validated(own) for own in params]
    order = sorted(range(len(members)), key=lambda i: -alone[i])
    best = members[order[0]]
    fishers = [_fisher(member, task) for member in members]
    found = {
        "uniform_soup": merging.uniform_soup(params),
        "greedy_soup": merging.greedy_soup(params, validated)[0],
        "fisher": merging.fisher_average(params, fishers),
        "slerp": _chosen(WEIGHTS, validated, lambda t: merging.slerp(best.params, params[order[1]], t)),
        "wise_ft": _chosen(WEIGHTS, validated, lambda t: tree.interpolate(start.params, best.params, t)),
    }
    rows = {
        "member": float(np.mean([score(member, task, "test") for member in members])),
        "best": score(best, task, "test"),
        **{arm: score(start.with_params(own), task, "test") for arm, own in found.items()},
    }
    return rows, _line(start, best, task)


def tasks(
    both: tuple[Classification, Classification], start: Model, tuned: tuple[Model, Model]
) -> dict[str, float]:
    """Mean test accuracy over both tasks of one merged body, each task with the head it was trained with."""
    bodies = [_body(model.params) for model in tuned]
    origin = _body(start.params)

    def mean(body: PyTree, split: str = "validation") -> float:
        return float(
            np.mean(
                [
                    score(model.with_params({**body, "head": model.params["head"]}), task, split)
                    for task, model in zip(both, tuned, strict=True)
                ]
            )
        )

    fishers = [_body(_fisher(model, task)) for task, model in zip(both, tuned, strict=True)]
    grams = [
        {
            path: gram
            for path, gram in merging.input_grams(model, _some(task)).items()
            if not path.startswith("head/")
        }
        for task, model in zip(both, tuned, strict=True)
    ]
    elected = merging.ties(origin, bodies)
    thinned = [merging.dare(origin, body, drop=0.5, key=jax.random.key(i)) for i, body in enumerate(bodies)]
    found = {
        "start": origin,
        "average": merging.uniform_soup(bodies),
        "task_arithmetic": _chosen(WEIGHTS, mean, lambda w: merging.task_arithmetic(origin, bodies, (w, w))),
        "ties": _chosen(WEIGHTS, mean, lambda w: tree.interpolate(origin, elected, 2 * w)),
        "dare": _chosen(WEIGHTS, mean, lambda w: merging.task_arithmetic(origin, thinned, (w, w))),
        "fisher": merging.fisher_average(bodies, fishers),
        "regmean": merging.regmean(bodies, grams),
    }
    own = [score(model, task, "test") for task, model in zip(both, tuned, strict=True)]
    return {"alone": float(np.mean(own)), **{arm: mean(body, "test") for arm, body in found.items()}}


def _chosen(weights: Any, score: Callable[[PyTree], float], make: Callable[[float], PyTree]) -> PyTree:
    """The parameters of the weight that validates best."""
    best = max(weights, key=lambda weight: score(make(weight)))
    return make(best)


def _body(params: PyTree) -> PyTree:
    return {name: leaves for name, leaves in params.items() if name != "head"}


def _some(task: Classification) -> Batches:
    """A few training examples, for Fisher information and Gram matrices."""
    few = task.splits["train"].take(np.arange(min(64, len(task.splits["train"]))))
    return Batches(few, 16, train=False, buckets=task.buckets[-1:])


def _fisher(model: Model, task: Classification) -> PyTree:
    return finetune.fisher(model, _some(task), mode="sampled", key=jax.random.key(0), chunk=4)


def _line(start: Model, best: Model, task: Classification) -> list[dict[str, Any]]:
    """Test accuracy on the line from ``start`` to ``best``, all of its points in one program."""
    test = Batches(task.splits["test"], 32, train=False, buckets=task.buckets[-1:])
    batches = jax.tree.map(lambda *fields: jnp.stack(fields), *test)

    def hits(model: Model) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            return jnp.sum((model(batch)["logits"].argmax(-1) == batch["label"]) * batch["weight"])

        return jax.lax.map(one, batches).sum()

    right = np.asarray(merging.wise_ft(start, best, jnp.asarray(CURVE), hits)) / len(task.splits["test"])
    return [{"arm": "wise_ft", "weight": w, "accuracy": float(r)} for w, r in zip(CURVE, right, strict=True)]


if __name__ == "__main__":
    main(run, Merge)
