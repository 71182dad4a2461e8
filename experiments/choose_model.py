"""Choose a pretrained model: rank candidates by transferability scores, then check the ranking by fine-tuning.

A score costs one forward pass over the training examples; fine-tuning every candidate costs far more. LogME (You
et al. 2021), H-score (Bao et al. 2019) and its shrunk form (Ibrahim et al. 2022) read the frozen features; LEEP
(Nguyen et al. 2020) and NCE (Tran et al. 2019) read a source classifier's opinion of the target examples: here a
logistic probe of each candidate on ``--source-data``. Each ranking is compared with the test accuracy after
fine-tuning by the weighted tau of Vigna 2015, 1 for the same order. The head of the fine-tuned models reads the very
features that the scores read.

    python -m experiments.choose_model --out runs/choose_model

Expected (``experiments/results/choose_model.json``): weighted tau 0.39 for LEEP, 0.24 for LogME, 0.23 for NCE, 0.16 and
0.07 for the H-scores. LEEP orders the random and the shortened models exactly, the others nearly; all put the whole one
fifth or sixth, which fine-tunes best: its last layer, made for sentence similarity, separates the classes worst before
fine-tuning.

Took 34 minutes on two CPU cores beside other work; a killed run goes on with ``--resume``.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification, body, frozen, prepare_classification
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import tree
from jtl.errors import InputError
from jtl.features import scores
from jtl.model import Model, with_config
from jtl.pretrained import scratch
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    format_estimate,
    summarise,
    table,
    write_report,
    write_result,
)

SCORES = ("logme", "leep", "nce", "h_score", "shrunk_h_score")


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
    train_examples: int = 1000
    """Labelled target examples."""
    source_examples: int = 2000
    """Source examples for the probes of LEEP and NCE."""
    seeds: int = 3
    """Repetitions of the fine-tuning."""
    steps: int = 60
    """Updates of each fine-tuning."""
    test_examples: int = 1000
    """Test examples."""


def run(config: ChooseModel) -> Result:
    """Score and fine-tune every candidate; writes into ``config.out`` and returns the result."""
    if len(config.candidates) < 3:
        raise InputError(f"--candidates needs at least three models to rank, got {len(config.candidates)}")
    out = prepare(config, "choose_model")
    ledger = ResumableRows(out, resume=config.resume)
    names = config.candidates[::3] if config.quick else config.candidates
    seeds = 1 if config.quick else config.seeds
    limits = (
        {"validation": 100, "test": 100}
        if config.quick
        else {"validation": 500, "test": config.test_examples or None}
    )
    steps = 20 if config.quick else config.steps
    budget = techniques.Budget(epochs=1, min_steps=steps, max_steps=steps, validations=3)

    scored: dict[str, dict[str, Any]] = {}
    for name in names:
        task, source = (
            dataclasses.replace(task, pretrained=candidate(name))
            for task in (
                prepare_classification(name.partition(":")[0], config.data, quick=config.quick, **limits),
                prepare_classification(
                    name.partition(":")[0],
                    config.source_data,
                    validation=100 if config.quick else 500,
                    test=100 if config.quick else 200,
                    quick=config.quick,
                ),
            )
        )
        task = task.with_train(256 if config.quick else config.train_examples or None, config.seed)
        source = source.with_train(256 if config.quick else config.source_examples, config.seed)

        def score(
            task: Classification = task, source: Classification = source
        ) -> tuple[dict[str, Any], list[Any]]:
            started = time.monotonic()
            return {**rate(task, source), "scoring_seconds": time.monotonic() - started}, []

        scored[name] = ledger.get(score, arm=name, seed=None)
        for seed in range(config.seed, config.seed + seeds):
            key = {"arm": name, "seed": seed}

            def tune(
                task: Classification = task, seed: int = seed
            ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
                done = techniques.run_arm(
                    task, "full", seed=seed, budget=budget, on="features", progress=False
                )
                return done.row, done.history

            row = ledger.get(tune, **key)
            print(
                f"{name}  seed {seed}  LogME {scored[name]['logme']:.3f}  fine-tuned accuracy {row['accuracy']:.3f}"
            )

    rows = [{**scored[row["arm"]], **row} for row in ledger.rows if row["seed"] is not None]
    accuracy = summarise(rows, ["accuracy", "seconds"])
    tuned = [accuracy["accuracy"][name]["mean"] for name in names]
    taus = {s: scores.weighted_tau([scored[name][s] for name in names], tuned) for s in SCORES}
    summary = {
        "weighted_tau": {s: {"mean": tau, "ci95": None, "n": 1} for s, tau in taus.items()},
        **accuracy,
    }
    result = Result("choose_model", settings(config), environment(), ledger.seconds, rows, summary)
    write_result(out, result)
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
    write_report(
        out,
        result,
        title=f"Which model for {config.data}?",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("choose_model", config),
        sections=sections,
        notes=["The candidates are few: a weighted tau over so short a list is a rough figure."],
    )
    return result


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


def rate(task: Classification, source: Classification) -> dict[str, float]:
    """Every transferability score of a candidate on the target's training examples."""
    x, labels = frozen(task, "train")
    opinion, _ = techniques.probe(source)
    logits = opinion(x)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    return {
        "logme": scores.logme(x, labels),
        "leep": scores.leep(chances, labels),
        "nce": scores.nce(chances.argmax(-1), labels),
        "h_score": scores.h_score(x, labels),
        "shrunk_h_score": scores.shrunk_h_score(x, labels),
        "probe_accuracy": techniques.probe(task)[1]["accuracy"],
    }


if __name__ == "__main__":
    main(run, ChooseModel)
