"""One arm of a comparison: a pretrained model adapted to data by one technique, and what that cost and gave.

An arm is one condition of a comparison: a technique on a task with a seed. All studies run theirs from here, so that a
technique means the same in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from experiments.common.classification import Classification, batches, frozen
from jtl import adapters, data, features, finetune, heads, measure, pretrained, tree
from jtl.data.batches.loader import Batches, loader
from jtl.errors import InputError
from jtl.model import Model, with_config
from jtl.outputs import outputs, predict
from jtl.tasks import Classify, accuracy, expected_calibration_error, macro_f1
from jtl.train import Checkpoints, Fitted, Step, adamw, fit, make_step, schedule

Technique = Literal[
    "scratch", "head", "lp_ft", "full", "layerwise", "gradual", "l2_sp", "bitfit",
    "lora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "bottleneck", "loreft", "prompt", "prefix",
]  # fmt: skip
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)

# Each at its usual rank: into every layer of the body but depthwise ones; those of activations behind whole blocks, IA3
# into the layers of its paper.
ADAPTERS: dict[str, Callable[..., Model]] = {
    "lora": adapters.lora, "dora": adapters.dora, "adalora": adapters.adalora, "vera": adapters.vera,
    "loha": adapters.loha, "lokr": adapters.lokr, "ia3": adapters.ia3, "bottleneck": adapters.bottleneck,
    "loreft": adapters.loreft, "prompt": adapters.prompt, "prefix": adapters.prefix,
}  # fmt: skip
ONLY_TEXT = ("prompt", "prefix")
ON_ACTIVATIONS = ("bottleneck", "loreft", *ONLY_TEXT)
WHERE = {
    "text": {
        "ia3": ".*/(key|value|mlp/output)",
        "bottleneck": ".*/mlp",
        "loreft": ".*/layer_[0-9]+",
        "other": "encoder/.*(query|key|value|output|intermediate)",
    },
    "image": {"bottleneck": "layer_[0-9]+", "loreft": "layer_[0-9]+", "other": "layer_.*/(expand|project)"},
}

# Peak learning rates of AdamW, chosen on validation. `scratch`, `head`, `lp_ft`, `full`, `layerwise`, `gradual` and
# `l2_sp` by experiments.tune: 256 examples, 60 updates; for `scratch` on texts, which learns nothing from so little,
# all examples, 300 updates. The others by the search of experiments.adapters. Both on seeds apart from those of the
# comparisons. Not searched: `layerwise`, `gradual` and `l2_sp` on texts.
RATES = {
    "text": {
        "scratch": 5e-4, "head": 1e-2, "layerwise": 2e-4, "bitfit": 3e-3, "lora": 1e-3, "dora": 1e-3, "adalora": 3e-2,
        "vera": 3e-2, "loha": 1e-3, "lokr": 1e-2, "ia3": 3e-2, "bottleneck": 3e-3, "loreft": 1e-2, "prompt": 3e-2,
        "prefix": 3e-2, "other": 1e-4,
    },
    "image": {
        "scratch": 6e-3, "head": 3e-3, "layerwise": 7e-4, "gradual": 5e-4, "bitfit": 6e-3, "lora": 2e-3, "dora": 2e-3,
        "adalora": 6e-3, "vera": 3e-2, "loha": 1e-3, "lokr": 6e-3, "ia3": 1e-2, "bottleneck": 6e-3, "loreft": 6e-3,
        "other": 3e-4,
    },
}  # fmt: skip
HEAD_STEPS = 10  # times the updates of other arms: on cached features they cost next to nothing


@dataclass(frozen=True)
class Budget:
    """How long an arm trains.

    Attributes:
        epochs: passes over the training examples ...
        min_steps: ... but at least so many updates, since few examples make short epochs ...
        max_steps: ... and at most so many, if given.
        batch_size: rows of a batch, at most the number of examples.
        validations: how often the model is validated; the best of them is kept.
        weight_decay: AdamW's.
    """

    epochs: int = 3
    min_steps: int = 60
    max_steps: int | None = None
    batch_size: int = 32
    validations: int = 3
    weight_decay: float = 0.01


@dataclass
class Arm:
    """What the training of one arm gave.

    Attributes:
        model: the model of the best validation.
        row: its measurements: accuracies, seconds, steps, parameters.
        history: the learning curve, as ``fit`` gives it.
        test: ``logits`` (N, C), ``features`` (N, D) and ``label`` (N,) on the test split, in its order.
    """

    model: Model
    row: dict[str, Any]
    history: list[dict[str, Any]]
    test: dict[str, np.ndarray]


def majority(task: Classification) -> dict[str, Any]:
    """The row of always predicting the most frequent training class."""
    counts = np.bincount(task.splits["train"].labels, minlength=task.classes)
    test = task.splits["test"].labels
    logits = np.broadcast_to(np.eye(task.classes)[counts.argmax()], (len(test), task.classes))
    return {"arm": "majority", "accuracy": accuracy(logits, test), "macro_f1": macro_f1(logits, test), "seconds": 0.0,
            "steps": 0, "trained_parameters": 0}  # fmt: skip


def probe(task: Classification, at: str = "features") -> tuple[features.Linear, dict[str, Any]]:
    """A logistic regression on frozen features, its penalty chosen on validation; and its row."""
    began = time.monotonic()
    (x, y), validation = frozen(task, "train", at), frozen(task, "validation", at)
    found = features.fit_logistic(x, y, classes=task.classes, validation=validation)
    logits, (test, labels) = found(x), frozen(task, "test", at)
    row = {
        "arm": "probe",
        **scores(found(test), labels),
        "train_accuracy": accuracy(logits, y),
        "validation_accuracy": accuracy(found(validation[0]), validation[1]),
        "seconds": time.monotonic() - began,
        "steps": 0,
        "trained_parameters": found.kernel.size + found.bias.size,
    }
    return found, row


def run_arm(
    task: Classification,
    technique: str,
    *,
    seed: int,
    budget: Budget = Budget(),
    rate: float | None = None,
    on: str | None = None,
    model: Model | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Arm:
    """Adapt the pretrained model to the task by ``technique``; test the model that validated best, once.

    Args:
        task: with its training examples already chosen.
        technique: ``scratch`` (the same architecture, random weights), ``head`` (frozen body, on cached
            features), ``lp_ft`` (the probe's head first), ``full``, ``layerwise`` (rates decay by 0.8 a layer),
            ``gradual`` (unfreezing, a group at a time over the first half), ``l2_sp``, ``bitfit`` (biases); or one
            of ``ADAPTERS``, beside a trainable head.
        seed: of the head, dropout and the order of examples.
        budget: how long to train.
        rate: peak learning rate; by default that of ``RATES``.
        on: the output that the head reads; by default that of the architecture's standard head.
        model: where to begin, with its head and whatever the technique inserts; by default ``initial_model`` makes it.
        out: folder for checkpoints and TensorBoard events; None keeps neither.
        resume: go on from the checkpoints in ``out``.
        progress: show a bar.
    """
    began = time.monotonic()
    init_key, run_key = jax.random.split(jax.random.key(seed))
    rate = usual_rate(technique, task.dataset.kind) if rate is None else rate
    train = task.splits["train"]
    size = min(budget.batch_size, len(train))
    per_epoch = len(train) // size

    model = initial_model(task, technique, init_key, on) if model is None else model
    whole, own = (model, task.splits) if technique != "head" else _head_alone(task, model)
    steps = max(budget.epochs * per_epoch, budget.min_steps)
    steps = min(steps, budget.max_steps or steps)
    validate_every = -(-steps // budget.validations)
    steps *= HEAD_STEPS if technique == "head" else 1
    lengths = None if technique == "head" else task.buckets
    validation = Batches(own["validation"], 64, train=False, buckets=lengths)
    order = Batches(own["train"], size, seed=seed, steps=steps, buckets=lengths)

    def validate(model: Model) -> dict[str, float]:
        logits, labels = predict(model, validation)
        return {"accuracy": accuracy(logits, labels)}

    step = build_step(task, technique, whole, steps, rate, budget)
    fitted: Fitted = fit(
        step,
        step.init(whole, run_key),
        loader(order),
        steps=steps,
        validate=validate,
        validate_every=validate_every,
        checkpoints=None if out is None else Checkpoints(out / "checkpoints"),
        resume=resume,
        log=None if out is None else out / "events",
        progress=progress,
    )
    best = model.with_params({**model.params, **fitted.model.params}) if technique == "head" else fitted.model
    trained_for = fitted.history[-1]["seconds"] if fitted.history else 0.0
    test = outputs(best, batches(task, "test"), ("logits", "features", "label"))
    fitted_on = replace(task, splits={"train": _sample(train)})
    train_logits, train_labels = predict(best, batches(fitted_on, "train"))
    row = {
        "arm": technique,
        "seed": seed,
        **scores(test["logits"], test["label"]),
        "train_accuracy": accuracy(train_logits, train_labels),
        "validation_accuracy": fitted.best["value"] if fitted.best else None,
        "seconds": time.monotonic() - began,
        "training_seconds": trained_for,
        "steps": steps,
        "learning_rate": rate,
        "trained_parameters": tree.size(step.init(whole, run_key).trained),
    }
    return Arm(best, row, fitted.history, test)


def usual_rate(technique: str, kind: str) -> float:
    """The peak learning rate of a technique on texts or images, from ``RATES``."""
    return RATES[kind].get(technique, RATES[kind]["other"])


def initial_model(task: Classification, technique: str, key: jax.Array, on: str | None = None) -> Model:
    """The model before its first step: pretrained or random body, new head."""
    trunk = task.pretrained
    if technique == "scratch":
        trunk = random_body(task.model_name, jax.random.fold_in(key, 1))
    model = heads.classifier(trunk, task.classes, key=key, on=on)
    if technique in ADAPTERS:
        return insert_adapter(task, technique, model, jax.random.fold_in(key, 2))
    if technique != "lp_ft":
        return model
    if "dense" in model.params["head"]:  # no probe solves a hidden layer
        model = heads.classifier(trunk, task.classes, key=key, on="features")
    found, _ = probe(task, _read_by_head(model))
    weights = found.as_head()
    return finetune.put_head(model, weights["kernel"], weights["bias"])


def _read_by_head(model: Model) -> str:
    head = heads.find(model)
    assert head is not None
    return head.on


def merge_adapter(model: Model, technique: str) -> Model:
    """``model`` with its adapter, if ``technique`` is one, folded into the weights.

    Raises:
        InputError: the adapter changes activations, so no weights hold it.
    """
    if technique in ON_ACTIVATIONS:
        raise InputError(
            f"{technique} is no change of weights, so no plain model holds it; its checkpoints do"
        )
    return adapters.merge(model) if technique in ADAPTERS else model


def insert_adapter(task: Classification, technique: str, model: Model, key: jax.Array) -> Model:
    """``model`` with the adapter called ``technique`` at its usual layers."""
    if technique in ONLY_TEXT and task.dataset.kind != "text":
        raise InputError(f"--technique {technique} needs a text model, and {task.model_name} reads images")
    where = WHERE[task.dataset.kind]
    places = {} if technique in ONLY_TEXT else {"where": where.get(technique, where["other"])}
    return ADAPTERS[technique](model, **places, key=key)


def random_body(name: str, key: jax.Array) -> Model:
    """The architecture called ``name`` with random weights.

    Its running statistics are over tens of updates, not hundreds: a short run from scratch has no more.
    """
    model = pretrained.scratch(name, key=key)
    if not hasattr(model.config, "batch_norm_momentum"):
        return model
    return with_config(model, batch_norm_momentum=0.9)


def build_step(
    task: Classification, technique: str, model: Model, steps: int, rate: float, budget: Budget
) -> Step:
    """The train step of a technique: which loss, which optimiser, which labels."""
    # A network from scratch has no running statistics yet; those of a pretrained one serve few examples better.
    loss: Any = Classify(stats="batch" if technique == "scratch" else "running")
    labels = None
    if technique == "layerwise":
        labels = finetune.layerwise(model, 0.8)
    elif technique == "gradual":
        depth = max(jax.tree.leaves(finetune.depths(model)))
        labels = finetune.gradual_unfreezing(model, every=max(1, steps // (2 * depth)))
    elif technique == "bitfit":
        labels = finetune.train_only(model, r".*/bias|head/.*")
    elif technique in ADAPTERS:
        labels = finetune.train_only(model, rf"(.*/)?{technique}/.*|head/.*")
    elif technique == "l2_sp":
        loss = loss + finetune.L2SP(task.pretrained.params, alpha=0.01, beta=0.01)
    decay = 0.0 if technique in ("l2_sp", "head") else budget.weight_decay
    optimizer = adamw(schedule(rate, steps), weight_decay=decay)
    if technique == "adalora":
        loss = loss + 0.1 * adapters.Orthogonality()
        optimizer = adapters.allocate(optimizer, rank=8, steps=steps, start=steps // 10, final=steps // 3)
    return make_step(loss, optimizer, labels)


def flops_per_example(task: Classification, technique: str, budget: Budget) -> float:
    """Floating-point operations of the compiled train step over its rows, padded as the median test text is."""
    rows = min(budget.batch_size, len(task.splits["train"]))
    return measure.flops(compiled_step(task, technique, budget)) / rows


def peak_memory(task: Classification, technique: str, budget: Budget) -> float:
    """Bytes that the compiled train step holds: arguments, results that reuse none of them, and temporaries."""
    return float(measure.memory(compiled_step(task, technique, budget)))


def compiled_step(task: Classification, technique: str, budget: Budget) -> Any:
    """The train step of a technique, compiled for a batch of texts padded as the median test text is, or of images."""
    model = initial_model(task, "full" if technique == "lp_ft" else technique, jax.random.key(0))
    whole, own = (model, task.splits) if technique != "head" else _head_alone(task, model)
    rows = min(budget.batch_size, len(own["train"]))
    length = next(bucket for bucket in task.buckets if bucket >= np.median(task.splits["test"].lengths))
    batch = own["train"].batch(np.arange(rows), length, None)
    batch |= {"weight": np.ones(rows, np.float32), "index": np.arange(rows, dtype=np.int32)}
    step = build_step(task, technique, whole, 100, 1.0, budget)
    return step.lower(whole, batch).compile()


def _head_alone(task: Classification, model: Model) -> tuple[Model, dict[str, data.Arrays]]:
    """The head as a model of its own, and the frozen features it reads."""
    on = _read_by_head(model)
    found = {split: frozen(task, split, on) for split in ("train", "validation")}
    return features.head_alone(model), {s: data.Arrays({on: x, "label": y}) for s, (x, y) in found.items()}


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and calibration error."""
    return {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "calibration_error": expected_calibration_error(logits, labels),
    }


def _sample(train: Any, most: int = 500) -> Any:
    """At most ``most`` training examples: enough to measure the gap between train and test."""
    return train.take(np.sort(np.random.default_rng(0).permutation(len(train))[:most]))
