"""Choose a pretrained model: rank candidates by transferability scores, then check the ranking by fine-tuning.

A score costs one forward pass over the training examples; fine-tuning every candidate costs far more. LogME, H-score
and shrunk H-score read frozen features; LEEP and NCE read the predictions of a classifier of other data.

    python -m experiments.choose_model --out runs/choose_model
    python -m experiments.choose_model --candidates minilm org/name folder --data reviews.csv --out runs/choice

Takes about half an hour on two CPU cores; a killed run goes on with ``--resume``.

Papers: LogME, https://arxiv.org/abs/2102.11005; H-score, Bao et al. 2019, and its shrunk form,
https://arxiv.org/abs/2110.06893; LEEP, https://arxiv.org/abs/2002.12462; NCE, https://arxiv.org/abs/1908.08142; the
weighted tau that compares rankings, https://arxiv.org/abs/1404.3325.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.common import Config, ResumableRows, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, body, frozen, prepare_classification
from jtl import tree
from jtl.errors import InputError
from jtl.features import scores
from jtl.model import Model, with_config
from jtl.pretrained import scratch
from jtl.report import Result, Section, figures, format_estimate, summarise, table

SCORES = ("logme", "leep", "nce", "h_score", "shrunk_h_score")
ABOUT = (
    "A transferability score costs one forward pass over the training examples; fine-tuning every candidate costs far "
    "more. LogME, the H-score and its shrunk form read the frozen features; LEEP and NCE read the predictions that a "
    "classifier of other data makes for the target examples: a logistic regression on each candidate's features of "
    "`source_data`. Each ranking is compared with the test accuracy after fine-tuning by Vigna's weighted tau, which "
    "is 1 for the same order. The head of the fine-tuned models reads the very features that the scores read."
)


@dataclass(frozen=True, kw_only=True)
class ChooseModel(Config):
    """Settings of the choice."""

    candidates: tuple[str, ...] = (
        "minilm",
        "minilm:5",
        "minilm:4",
        "minilm:3",
        "minilm:2",
        "minilm:1",
        "minilm:random",
    )
    """Models: a name, folder or hub id; NAME:k keeps the first k layers; NAME:random draws new weights."""
    data: str = "rotten_tomatoes"
    """The target texts."""
    source_data: str = "newsgroups20"
    """The texts whose classes LEEP and NCE transfer from."""
    train_examples: int = at_least(0, 1000)
    """Labelled target examples; 0 for all there are."""
    source_examples: int = at_least(1, 2000)
    """Source examples for the probes of LEEP and NCE."""
    seeds: int = at_least(1, 3)
    """Repetitions of the fine-tuning."""
    steps: int = at_least(1, 60)
    """Updates of each fine-tuning."""
    test_examples: int = at_least(0, 1000)
    """Test examples; 0 for all there are."""


def run(config: ChooseModel) -> Result:
    """Score and fine-tune every candidate; writes into ``config.out`` and returns the result."""
    if len(config.candidates) < 3:
        raise InputError(f"--candidates needs at least three models to rank, got {len(config.candidates)}")
    rows = ResumableRows(prepare(config, "choose_model"), resume=config.resume)
    quick = config.quick
    names = config.candidates[::3] if quick else config.candidates
    steps = 20 if quick else config.steps
    budget = techniques.Budget(epochs=1, min_steps=steps, max_steps=steps, validations=3)

    def fine_tuned(task: Classification, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        done = techniques.run_arm(task, "full", seed=seed, budget=budget, on="features", progress=False)
        return done.row, done.history

    scored: dict[str, dict[str, Any]] = {}
    for name in names:
        task, source = (
            dataclasses.replace(
                prepare_classification(
                    name.partition(":")[0],
                    data,
                    validation=100 if quick else 500,
                    test=100 if quick else test,
                    quick=quick,
                ),
                pretrained=candidate(name),
            ).with_train(256 if quick else train, config.seed)
            for data, train, test in (
                (config.data, config.train_examples or None, config.test_examples or None),
                (config.source_data, config.source_examples, 200),
            )
        )
        scored[name] = rows.get(partial(score, task, source), arm=name, seed=None)
        for seed in range(config.seed, config.seed + (1 if quick else config.seeds)):
            row = rows.get(partial(fine_tuned, task, seed), arm=name, seed=seed)
            told = f"LogME {scored[name]['logme']:.3f}  fine-tuned accuracy {row['accuracy']:.3f}"
            print(f"{name}  seed {seed}  {told}")

    found = [{**scored[row["arm"]], **row} for row in rows.rows if row["seed"] is not None]
    accuracy = summarise(found, ["accuracy", "seconds"])
    tuned = [accuracy["accuracy"][name]["mean"] for name in names]
    taus = {s: scores.weighted_tau([scored[name][s] for name in names], tuned) for s in SCORES}
    order = sorted(names, key=lambda name: -scored[name]["logme"])
    ranking = table(
        ["candidate", *SCORES, "fine-tuned accuracy", "seconds to score", "seconds to tune"],
        [
            [name, *(f"{scored[name][s]:.4f}" for s in SCORES), format_estimate(accuracy["accuracy"][name]),
             f"{scored[name]['scoring_seconds']:.1f}", f"{accuracy['seconds'][name]['mean']:.1f}"]
            for name in order
        ],
    )  # fmt: skip
    sections = [
        Section("Ranking", f"Best LogME first.\n\n{ranking}"),
        *(
            Section(
                f"{s} against accuracy",
                "",
                figures.score_scatter([scored[n][s] for n in names], tuned, names, s, taus[s]),
            )
            for s in SCORES
        ),
    ]
    return finish(
        "choose_model",
        config,
        found,
        sections,
        title=f"Which model for {config.data}?",
        about=ABOUT,
        summary={"weighted_tau": {s: {"mean": t, "ci95": None, "n": 1} for s, t in taus.items()}, **accuracy},
        notes=["The candidates are few: a weighted tau over so short a list is a rough figure."],
        seconds=rows.seconds,
    )


def candidate(name: str) -> Model:
    """The body that a candidate's name means: see ``ChooseModel.candidates``."""
    base, _, part = name.partition(":")
    if not part:
        return body(base)
    if part == "random":
        return scratch(base, key=jax.random.key(0))
    model = body(base)
    layers = getattr(model.config, "num_hidden_layers", 0)
    if not part.isdigit() or not 1 <= int(part) <= layers:
        raise InputError(
            f"--candidates {name!r}: after the colon comes random or a number of layers, 1 to {layers}"
        )
    if int(part) == layers:
        return model
    above = "|".join(map(str, range(int(part), layers)))
    shorter = model.with_params(tree.remove(rf"encoder/layer_({above})/.*", model.params))
    return with_config(shorter, num_hidden_layers=int(part))


def score(task: Classification, source: Classification) -> tuple[dict[str, float], list[Any]]:
    """Every transferability score of a candidate on the target's training examples, as a row without a curve."""
    began = time.monotonic()
    x, labels = frozen(task, "train")
    source_probe, _ = techniques.probe(source)
    logits = source_probe(x)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    found = {
        "logme": scores.logme(x, labels),
        "leep": scores.leep(probabilities, labels),
        "nce": scores.nce(probabilities.argmax(-1), labels),
        "h_score": scores.h_score(x, labels),
        "shrunk_h_score": scores.shrunk_h_score(x, labels),
        "probe_accuracy": techniques.probe(task)[1]["accuracy"],
    }
    return {**found, "scoring_seconds": time.monotonic() - began}, []


if __name__ == "__main__":
    main(run, ChooseModel)
