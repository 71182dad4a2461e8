"""Students and the teachers they learn from, made ready: what every method of distillation starts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.common import techniques
from experiments.common.classification import Classification
from jtl import distill, heads
from jtl.errors import InputError
from jtl.model import Model, linen
from jtl.models.conv4 import Conv4

CONV4_WIDTH, CONV4_RATE = 32, 2e-3
ONE_LAYER_RATE = 1e-3  # best on validation of 1e-4, 3e-4, 1e-3 and 3e-3; the lowest two learn nothing


@dataclass(frozen=True)
class Student:
    """How a student is made out of its teacher, and which of their layers compare.

    Attributes:
        name: ``layers_3`` (so many layers of the teacher), ``conv4`` or ``same`` (the pretrained model again).
        start: from teacher, task and key to the student before training.
        maps: pairs (student's, teacher's) of layers with the same positions, shallow to deep, before any norm.
        hint: the pair of the hint, in the middle of both.
        stats: how the student normalises while training.
        rate: peak learning rate of AdamW.
    """

    name: str
    start: Callable[[Model, Classification, jax.Array], Model]
    maps: tuple[tuple[str, str], ...]
    hint: tuple[str, str]
    stats: Literal["running", "batch"]
    rate: float


def choose(name: str, task: Classification) -> Student:
    """The student called ``name``. Raises ValueError if the task's model can have none of that name."""
    kind = task.dataset.kind
    if name == "conv4" and kind == "image":
        levels = (("norm_2", "layer_2"), ("norm_3", "layer_4"), ("map", "layer_10"))
        return Student(name, _conv4, levels, levels[1], "batch", CONV4_RATE)
    usual = techniques.usual_rate("full", kind)
    if name == "same":
        return Student(name, _same, (), ("features", "features"), "running", usual)
    depth = getattr(task.pretrained.config, "num_hidden_layers", None)
    count = name.removeprefix("layers_")
    if kind != "text" or depth is None or not count.isdigit() or depth % int(count or 1):
        raise InputError(
            f"--student {name}: text models have students layers_K, K a divisor of their {depth or '(unknown)'} "
            "layers, image models conv4, and both the pretrained model again, same"
        )
    each = depth // int(count)
    # Student layer i stands for teacher layers i·each ... (i + 1)·each - 1, of which it begins as the first.
    ends = [(i, (i + 1) * each - 1) for i in range(int(count))]
    maps = tuple((f"encoder/layer_{i}/mlp", f"encoder/layer_{end}/mlp") for i, end in ends)
    i, end = ends[(len(ends) - 1) // 2]
    hint = (f"encoder/layer_{i}", f"encoder/layer_{end}")

    def start(teacher: Model, task: Classification, key: jax.Array) -> Model:
        return distill.choose_layers(teacher, range(0, depth, each))

    return Student(name, start, maps, hint, "running", ONE_LAYER_RATE if count == "1" else usual)


def _same(teacher: Model, task: Classification, key: jax.Array) -> Model:
    return techniques.initial_model(task, "full", key)


def _conv4(teacher: Model, task: Classification, key: jax.Array) -> Model:
    module = Conv4(CONV4_WIDTH)
    side = task.splits["train"].preprocess.size
    body = linen(module, jax.jit(module.init)(key, jnp.zeros((2, *side, 3))))
    width = jax.eval_shape(body, {"image": jnp.zeros((2, *side, 3))})["features"].shape[-1]
    return heads.classifier(body, task.classes, key=key, on="features", width=width)
