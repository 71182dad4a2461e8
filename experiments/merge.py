"""Model merging: one model out of several that were fine-tuned from the same start, without further training.

*soup* merges models of one task, fine-tuned with other learning rates and orders of examples. *tasks* merges a model of
each of two tasks into one body that serves both, each task with its own head. What a method has to choose is chosen on
validation; the test split is used once for each arm.

    python -m experiments.merge --out runs/merge

Papers: uniform and greedy soup, https://arxiv.org/abs/2203.05482; Fisher-weighted average,
https://arxiv.org/abs/2111.09832; WiSE-FT, https://arxiv.org/abs/2109.01903; task arithmetic,
https://arxiv.org/abs/2212.04089; TIES, https://arxiv.org/abs/2306.01708; DARE, https://arxiv.org/abs/2311.03099;
RegMean, https://arxiv.org/abs/2212.09849.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, prepare_classification, score
from jtl import finetune, merging, tree
from jtl.data.batches.loader import Batches
from jtl.errors import InputError
from jtl.model import Model
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table

PARTS = ("soup", "tasks")
WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)  # tried on validation
CURVE = tuple(np.linspace(0, 1, 11).round(1).tolist())
SOUP = (
    "All members begin at the pretrained body under a probe's head. `member` is their mean accuracy, `best` the one "
    "that validated best; the others are made of the members: `slerp` of the two best, `wise_ft` of start and best."
)
TASKS = (
    "One model of each task, merged into one body; each task keeps its own head. `alone` is each task's own model, "
    "`start` the pretrained body under those heads."
)


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
    max_length: int = at_least(1, 64)
    """Longest text in tokens; the rest is cut off."""
    rates: tuple[float, ...] = above(0, (5e-5, 1e-4, 2e-4))
    """Peak learning rates, one for each member of the soup."""
    train_examples: int = at_least(0, 1024)
    """Labelled training examples of each task; 0 for all there are."""
    batch_size: int = at_least(1, 32)
    """Examples an update."""
    test_examples: int = at_least(0, 1000)
    """Test examples of each task; 0 for all there are."""
    seeds: int = at_least(1, 3)
    """Repetitions: other starts of the head, other examples."""


def run(config: Merge) -> Result:
    """Fine-tune and merge; writes into ``config.out`` and returns the result."""
    if len(config.rates) < 2:
        raise InputError(f"--rates needs at least two members to merge, got {config.rates}")
    rows = ResumableRows(prepare(config, "merge"), resume=config.resume)
    quick = config.quick
    pair = [
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
    ]
    count = 128 if quick else config.train_examples or None
    for seed in range(config.seed, config.seed + (1 if quick else config.seeds)):
        one, two = (task.with_train(count, seed) for task in pair)
        row = rows.get(partial(_merged, config, one, two, seed), seed=seed)
        print(f"seed {seed}", {part: {a: round(v, 3) for a, v in row[part].items()} for part in PARTS})

    found = [
        {"part": part, "arm": arm, "seed": row["seed"], "accuracy": value}
        for row in rows.rows
        for part in PARTS
        for arm, value in row[part].items()
    ]
    parts = {part: [row for row in found if row["part"] == part] for part in PARTS}
    line = figures.over_weights(rows.curves, "accuracy")
    return finish(
        "merge",
        config,
        found,
        [
            _against(parts["soup"], "member", "Soup", SOUP),
            _against(parts["tasks"], "alone", "Tasks", TASKS),
            Section("From the start to the best member", "Test accuracy along the line (WiSE-FT).", line),
        ],
        title=f"Merging models of {config.model}",
        about=f"{len(_rates(config))} members fine-tuned on `{config.data}`, and one on `{config.other_data}`, "
        f"{len(one.splits['train']):,} examples each; accuracies on test, that of *tasks* the mean over both.",
        summary={f"accuracy_{part}": summarise(own, ["accuracy"])["accuracy"] for part, own in parts.items()},
        seconds=rows.seconds,
    )


def _rates(config: Merge) -> tuple[float, ...]:
    return config.rates[:2] if config.quick else config.rates


def _merged(
    config: Merge, one: Classification, two: Classification, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The accuracies of both parts with one seed, and those along the line of WiSE-FT."""
    start = techniques.initial_model(one, "lp_ft", jax.random.key(seed), on="features")
    budget = techniques.Budget(
        epochs=1, min_steps=4 if config.quick else 30, batch_size=config.batch_size, validations=1
    )
    train = partial(techniques.run_arm, technique="full", budget=budget)
    rates = _rates(config)
    members = [train(one, seed=seed + 1000 * i, rate=rate, model=start).model for i, rate in enumerate(rates)]
    weights, curve = (WEIGHTS[1::2], CURVE[::2]) if config.quick else (WEIGHTS, CURVE)
    accuracies, line = soup(one, start, members, weights, curve)
    other = train(two, seed=seed, on="features").model
    usual = techniques.usual_rate("full", one.dataset.kind)
    nearest = min(range(len(rates)), key=lambda i: abs(rates[i] - usual))
    return {"soup": accuracies, "tasks": tasks((one, two), start, (members[nearest], other), weights)}, line


def _against(rows: list[dict[str, Any]], base: str, title: str, text: str) -> Section:
    names = dict.fromkeys(row["arm"] for row in rows)
    found = summarise(rows, ["accuracy"])["accuracy"]
    lines = [
        [arm, format_estimate(found[arm]), format_estimate(paired_difference(rows, "accuracy", arm, base))]
        for arm in names
    ]
    return Section(title, f"{text}\n\n{table(['arm', 'accuracy', f'less {base}'], lines)}")


def soup(
    task: Classification,
    start: Model,
    members: list[Model],
    weights: Sequence[float],
    curve: Sequence[float],
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
        "slerp": _by_validation(
            validated, weights, lambda t: merging.slerp(best.params, params[order[1]], t)
        ),
        "wise_ft": _by_validation(
            validated, weights, lambda t: tree.interpolate(start.params, best.params, t)
        ),
    }
    rows = {
        "member": float(np.mean([score(member, task, "test") for member in members])),
        "best": score(best, task, "test"),
        **{arm: score(start.with_params(own), task, "test") for arm, own in found.items()},
    }
    return rows, _line(start, best, task, curve)


def tasks(
    both: tuple[Classification, Classification],
    start: Model,
    tuned: tuple[Model, Model],
    weights: Sequence[float],
) -> dict[str, float]:
    """Mean test accuracy over both tasks of one merged body, each task with the head it was trained with."""
    bodies = [_body(model.params) for model in tuned]
    origin = _body(start.params)
    pairs = list(zip(both, tuned, strict=True))

    def mean(body: PyTree, split: str = "validation") -> float:
        headed = [(model.with_params({**body, "head": model.params["head"]}), task) for task, model in pairs]
        return float(np.mean([score(model, task, split) for model, task in headed]))

    fishers = [_body(_fisher(model, task)) for task, model in pairs]
    grams = [
        {
            path: gram
            for path, gram in merging.input_grams(model, _few(task)).items()
            if not path.startswith("head/")
        }
        for task, model in pairs
    ]
    elected = merging.ties(origin, bodies)
    thinned = [merging.dare(origin, body, drop=0.5, key=jax.random.key(i)) for i, body in enumerate(bodies)]
    found = {
        "start": origin,
        "average": merging.uniform_soup(bodies),
        "task_arithmetic": _by_validation(
            mean, weights, lambda w: merging.task_arithmetic(origin, bodies, (w, w))
        ),
        "ties": _by_validation(mean, weights, lambda w: tree.interpolate(origin, elected, 2 * w)),
        "dare": _by_validation(mean, weights, lambda w: merging.task_arithmetic(origin, thinned, (w, w))),
        "fisher": merging.fisher_average(bodies, fishers),
        "regmean": merging.regmean(bodies, grams),
    }
    own = [score(model, task, "test") for task, model in pairs]
    return {"alone": float(np.mean(own)), **{arm: mean(body, "test") for arm, body in found.items()}}


def _by_validation(
    score: Callable[[PyTree], float], weights: Sequence[float], make: Callable[[float], PyTree]
) -> PyTree:
    """The parameters of the weight that validates best."""
    best = max(weights, key=lambda weight: score(make(weight)))
    return make(best)


def _body(params: PyTree) -> PyTree:
    return {name: leaves for name, leaves in params.items() if name != "head"}


def _few(task: Classification) -> Batches:
    """A few training examples, for Fisher information and Gram matrices."""
    few = task.splits["train"].take(np.arange(min(64, len(task.splits["train"]))))
    return Batches(few, 16, train=False, buckets=task.buckets[-1:])


def _fisher(model: Model, task: Classification) -> PyTree:
    return finetune.fisher(model, _few(task), mode="sampled", key=jax.random.key(0), chunk=4)


def _line(start: Model, best: Model, task: Classification, curve: Sequence[float]) -> list[dict[str, Any]]:
    """Test accuracy on the line from ``start`` to ``best``, all of its points in one program."""
    test = Batches(task.splits["test"], 32, train=False, buckets=task.buckets[-1:])
    batches = jax.tree.map(lambda *fields: jnp.stack(fields), *test)

    def hits(model: Model) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            return jnp.sum((model(batch)["logits"].argmax(-1) == batch["label"]) * batch["weight"])

        return jax.lax.map(one, batches).sum()

    right = np.asarray(merging.wise_ft(start, best, jnp.asarray(curve), hits)) / len(task.splits["test"])
    return [{"arm": "wise_ft", "weight": w, "accuracy": float(r)} for w, r in zip(curve, right, strict=True)]


if __name__ == "__main__":
    main(run, Merge)
