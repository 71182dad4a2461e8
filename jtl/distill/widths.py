"""Makes a narrower student from its teacher by structured magnitude pruning: it keeps the channels of largest weight.

A channel's importance is the Euclidean norm of all weights that read or write it. (Li et al. 2017, "Pruning Filters
for Efficient ConvNets", https://arxiv.org/abs/1608.08710, rank filters in this way by their L1 norm.) The student does
not compute what its teacher does; train it by distillation.
"""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from jtl import tree
from jtl.distill.student import check_bare, rebuild
from jtl.errors import InputError
from jtl.model import Linen, Model

# The meaning of each axis of BERT's leaves: "keys" are the inner channels of query and key, "values" those of value
# and output, both H · E with head h at h·E ... (h+1)·E.
AXES = (
    (r"embeddings/(word|position|token_type)/embedding", "- hidden"),
    (r".*norm/(scale|bias)", "hidden"),
    (r".*/attention/(query|key)/kernel", "hidden keys"),
    (r".*/attention/(query|key)/bias", "keys"),
    (r".*/attention/value/kernel", "hidden values"),
    (r".*/attention/value/bias", "values"),
    (r".*/attention/output/kernel", "values hidden"),
    (r".*/mlp/intermediate/kernel", "hidden intermediate"),
    (r".*/mlp/intermediate/bias", "intermediate"),
    (r".*/mlp/output/kernel", "intermediate hidden"),
    (r".*/output/bias", "hidden"),
    (r"(pooler|head/dense)/kernel", "hidden hidden"),
    (r"(pooler|head/dense)/bias", "hidden"),
    (r"head/out/kernel", "hidden -"),
    (r"head/out/bias", "-"),
)


def choose_widths(
    teacher: Model, *, hidden: int | None = None, heads: int | None = None, intermediate: int | None = None
) -> Model:
    """Returns the teacher with only its most important channels; None keeps all.

    Hidden channels are chosen once for the whole model, because residual sums tie them. Heads, the channels of each
    head and intermediate channels are chosen separately in each layer. Queries are rescaled so that attention logits,
    over fewer channels, keep the teacher's scale.

    Args:
        teacher: a BERT or RoBERTa of ``jtl.models``, with or without its standard head.
        hidden: D of the student.
        heads: its attention heads; a head has ``hidden / heads`` channels, at most as many as the teacher's.
        intermediate: channels of its MLPs.

    Raises:
        ValueError: a size is above the teacher's, ``heads`` does not divide ``hidden`` or makes heads wider than the
            teacher's, or the architecture is another.
    """
    config = teacher.config
    if not isinstance(teacher.base, Linen) or getattr(config, "model_type", "") not in ("bert", "roberta"):
        raise InputError("choose_widths knows BERT and RoBERTa of jtl.models alone")
    check_bare(teacher)
    old = {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
    }
    given = {"hidden": hidden, "heads": heads, "intermediate": intermediate}
    new = {name: old[name] if size is None else size for name, size in given.items()}
    for name, size in new.items():
        if not 1 <= size <= old[name]:
            raise InputError(f"{name}={size}: the student keeps 1 to {old[name]} of the teacher's")
    before, after = old["hidden"] // old["heads"], new["hidden"] // new["heads"]
    if new["hidden"] % new["heads"] or after > before:
        raise InputError(
            f"hidden={new['hidden']} over heads={new['heads']} must be a whole number, at most the teacher's {before}"
        )

    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(teacher.params).items()}
    axes = _axes(teacher)
    energy = _energy(leaves, axes)
    kept: dict[tuple[str, str], np.ndarray] = {("-", ""): np.array([], int)}
    for (axis, layer), squares in energy.items():
        if axis in ("hidden", "intermediate"):
            kept[axis, layer] = _largest(squares, new[axis])
    for layer in {layer for axis, layer in energy if axis == "keys"}:
        by_head = {axis: energy[axis, layer].reshape(old["heads"], before) for axis in ("keys", "values")}
        best = _largest(by_head["keys"].sum(1) + by_head["values"].sum(1), new["heads"])
        for axis, squares in by_head.items():
            kept[axis, layer] = np.concatenate([h * before + _largest(squares[h], after) for h in best])

    cut = {}
    for path, leaf in tree.flatten(teacher.params).items():
        for number, axis in enumerate(axes[path]):
            if axis != "-":
                leaf = jnp.take(leaf, kept[axis, _layer(axis, path)], number)
        scale = (after / before) ** 0.5 if "/attention/query/" in path else 1.0
        cut[path] = leaf * scale if scale != 1 else leaf
    return rebuild(
        teacher,
        tree.nest(cut),
        hidden_size=new["hidden"],
        num_attention_heads=new["heads"],
        intermediate_size=new["intermediate"],
    )


def _axes(model: Model) -> dict[str, list[str]]:
    """The meaning of each axis of each leaf; raises RuleError for a leaf that no rule covers."""
    paths = tree.flatten(model.params)
    met = [rule for rule in AXES if any(re.fullmatch(rule[0], path) for path in paths)]
    return {path: axes.split() for path, axes in tree.flatten(tree.assign(met, model.params)).items()}


def _layer(axis: str, path: str) -> str:
    """Where the channels of an axis are counted: the whole model, or one layer."""
    return "" if axis == "hidden" else path[: path.index("/", len("encoder/"))]


def _energy(leaves: dict[str, np.ndarray], axes: dict[str, list[str]]) -> dict[tuple[str, str], np.ndarray]:
    """The sum of the squares of all weights at each channel."""
    energy: dict[tuple[str, str], np.ndarray] = {}
    for path, leaf in leaves.items():
        for number, axis in enumerate(axes[path]):
            if axis != "-":
                squares = np.square(leaf).sum(tuple(n for n in range(leaf.ndim) if n != number))
                place = axis, _layer(axis, path)
                energy[place] = energy.get(place, 0) + squares
    return energy


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices of the ``count`` largest, ascending; of equal values, the first."""
    return np.sort(np.argsort(-values, kind="stable")[:count])
