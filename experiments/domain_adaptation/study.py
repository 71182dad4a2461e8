"""The study of domain adaptation: runs its arms, summarises them and writes the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import ResumableRows, finish, prepare
from experiments.domain_adaptation.config import PAIRS, DomainAdaptation
from experiments.domain_adaptation.domains import DomainPair, prepare_domains
from experiments.domain_adaptation.methods import NAMES, ONLY_BATCH_NORM, ONLY_IMAGE
from experiments.domain_adaptation.training import CHOSEN, RULES, Trainer, file_of, key_of
from jtl.errors import InputError
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table

ABOUT = """Every method trains from the same start, with the same number of updates, on source examples with labels and
target examples without. The target test accuracy is measured at several points of the run, and every rule of
jtl.domain.protocol chooses one of them. Accuracy is what information maximisation chooses, the rule that was fixed
before any run; oracle chooses with target labels, last is the end of the run. Weights of losses are those of the
papers, or 1: none was tuned with target labels. source_only and target_trained (which has target labels, and chooses
with them) bound the rest. augmented sees the source alone, in the views of fixmatch: what that method owes to them.
Images train a small network (Conv4) from scratch, texts a network of one hidden layer on the frozen features of MiniLM,
unless a model is named. Network, rate and number of updates are the same for every method."""
SHOWN = 5  # methods in the figures, beside the bounds


def run(config: DomainAdaptation) -> Result:
    """Train every method on every task; writes into ``config.out`` and returns the result."""
    if (config.source is None) != (config.target is None):
        raise InputError("--source and --target go together: name both, or neither and a --task")
    if config.steps is not None and config.validations > config.steps:
        raise InputError(f"--validations {config.validations} is over --steps {config.steps}")
    out = prepare(config, "domain_adaptation")
    rows = ResumableRows(out, resume=config.resume)
    tasks: dict[str, list[tuple[str, str]]] = {name: PAIRS[name] for name in config.task}
    if config.source and config.target:
        tasks = {"own": [(config.source, config.target)]}
    for task, pairs in tasks.items():
        for source, target in pairs[:1] if config.quick else pairs:
            pair = prepare_domains(
                task, source, target, model=config.model, frozen=config.frozen, max_length=config.max_length,
                train=1000 if config.quick else None, validation=200 if config.quick else 500,
                test=200 if config.quick else config.test_examples or None,
            )  # fmt: skip
            trainer = Trainer(pair, config)
            for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
                for method in _methods(config, pair):
                    key: dict[str, Any] = {"task": task, "target": target, "arm": method, "seed": seed}
                    row = rows.get(partial(trainer, **key), **key)
                    shown = "  ".join(
                        f"{rule} {row[key_of(rule)]:.3f}" for rule in (CHOSEN, "oracle", "last")
                    )
                    print(f"{target}  seed {seed}  {method}  {shown}  {row['seconds']:.0f} s")
    summary = {
        _summary_key(task, rule): summarise(_of(rows.rows, task), [key_of(rule)])[key_of(rule)]
        for task in tasks
        for rule in RULES
    }
    sections = [section for task in tasks for section in _sections(task, rows.rows, rows.curves, out)]
    return finish(
        "domain_adaptation", config, rows, sections, title="Domain adaptation", about=ABOUT, summary=summary
    )


def _methods(config: DomainAdaptation, pair: DomainPair) -> list[str]:
    wanted: tuple[str, ...] = config.method
    if "all" in wanted:
        wanted = ("dann", "coral", "adabn") if config.quick else NAMES
    unfit: set[str] = set()
    if "image" not in pair.source["train"].batch(np.array([0, 1]), (pair.buckets or (1,))[-1], None):
        unfit |= set(ONLY_IMAGE)
    if "batch_stats" not in pair.start(jax.random.key(0)).variables:
        unfit |= set(ONLY_BATCH_NORM)
    if refused := unfit & set(config.method):
        raise InputError(
            f"--method {' '.join(sorted(refused))}: augmented and fixmatch need images, adabn and tent a network "
            "with batch normalisation, such as conv4"
        )
    bounds = ("source_only", "target_trained")
    return [*bounds, *(m for m in wanted if m not in bounds and m not in unfit)]


# --- report ----------------------------------------------------------------------------------------


def _summary_key(task: str, rule: str) -> str:
    return f"accuracy_{task}" if rule == CHOSEN else f"accuracy_{task}_{rule}"


def _of(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """A row for each arm and seed of a task, the mean over its pairs."""
    own = [row for row in rows if row["task"] == task]
    merged = []
    for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in own):
        group = [row for row in own if (row["arm"], row["seed"]) == (arm, seed)]
        means = {key_of(rule): float(np.mean([row[key_of(rule)] for row in group])) for rule in RULES}
        means["seconds"] = float(np.sum([row["seconds"] for row in group]))
        merged.append({"arm": arm, "seed": seed, **means})
    return merged


def _sections(
    task: str, rows: list[dict[str, Any]], curves: list[dict[str, Any]], out: Path
) -> list[Section]:
    own = _of(rows, task)
    keys = [key_of(rule) for rule in RULES]
    found = summarise(own, [*keys, "seconds"])
    order = sorted(found["accuracy"], key=lambda arm: -found["accuracy"][arm]["mean"])
    low, high = (found["accuracy"][arm]["mean"] for arm in ("source_only", "target_trained"))
    lines = []
    for arm in order:
        less = None if arm == "source_only" else paired_difference(own, "accuracy", arm, "source_only")
        closed = (found["accuracy"][arm]["mean"] - low) / (high - low) if high > low else float("nan")
        lines.append(
            [arm, format_estimate(found["accuracy"][arm]), format_estimate(less) if less else "", f"{closed:.0%}",
             *(format_estimate(found[key][arm]) for key in keys[1:]), f"{found['seconds'][arm]['mean']:.0f}"]
        )  # fmt: skip
    head = ["method", "accuracy", "less source_only", "of the gap",
            *(rule.replace("_", " ") for rule in RULES[1:]), "seconds"]  # fmt: skip
    sections = [Section(f"{task}: target test accuracy by rule of choice", table(head, lines))]

    best = [arm for arm in order if arm not in ("source_only", "target_trained")][:SHOWN]
    shown = ["source_only", "target_trained", *best]
    curves = [row for row in curves if row["task"] == task]
    if few := [row for row in curves if row["arm"] in shown]:
        sections.append(
            Section(
                f"{task}: over the run",
                "Training loss, and target validation accuracy, which no rule but the oracle sees.",
                figures.learning_curves(few, "validation_target_accuracy"),
            )
        )
    if reversed_ := [row for row in curves if "reversal" in row]:
        sections.append(
            Section(
                f"{task}: strength of the reversal",
                "λ grows over this run's own steps.",
                figures.over_steps(reversed_, "reversal", "λ"),
            )
        )
    for target in dict.fromkeys(row["target"] for row in rows if row["task"] == task):
        stored = {arm: file_of(out, target, arm) for arm in ("source_only", *best[:1])}
        if all(path.exists() for path in stored.values()):
            sections += _pictures(target, stored)
            break  # one pair of a task is enough to look at
    return sections


def _pictures(target: str, paths: dict[str, Path]) -> list[Section]:
    loaded = {arm: dict(np.load(path)) for arm, path in paths.items()}
    count = min(min(len(found["source"]), len(found["features"])) for found in loaded.values())
    both = {arm: np.concatenate([f["source"][:count], f["features"][:count]]) for arm, f in loaded.items()}
    place = np.repeat([0, 1], count)
    sections = [
        Section(
            f"{target}: features of both domains",
            "The first two principal components, of the first seed.",
            figures.embeddings(both, place, ("source", "target")),
        )
    ]
    for arm, found in loaded.items():
        names = [str(c) for c in range(found["logits"].shape[-1])]
        sections.append(
            Section(
                f"{target}: confusion of {arm}",
                "True against predicted classes of target test examples, of the first seed.",
                figures.confusion(found["label"], found["logits"].argmax(-1), names),
            )
        )
    return sections
