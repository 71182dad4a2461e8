"""Synaptic intelligence (SI): a penalty on moving parameters that were important for earlier tasks.

Like EWC it pulls quadratically towards the parameters after earlier tasks, but the importance of a parameter is how
much its own moves reduced the loss, summed during training. Zenke, Poole and Ganguli 2017, "Continual Learning Through
Synaptic Intelligence", https://arxiv.org/abs/1703.04200.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.finetune.anchor import check_leaves
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs


class SI(Loss):
    """The SI penalty, ``c · Σ_i Ω_i (w_i - w*_i)²`` (equation 4), over the leaves of ``importance``.

    Attributes:
        anchor: nested dict of w*, the parameters after the earlier tasks; it may hold more leaves than ``importance``.
        importance: nested dict of Ω, from ``path_importance``.
        strength: c.

    >>> from jtl.wrap import function
    >>> model = function(lambda params: params, {"w": jnp.array([3.0, 0.0])})
    >>> penalty = SI({"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([2.0, 0.5])}, strength=1.0)
    >>> float(penalty(model, {}, None)[0])  # 2 · 2² + 0.5 · 1²
    8.5
    """

    anchor: PyTree
    importance: PyTree
    strength: Any

    def mode(self) -> None:
        """Returns None: the penalty reads only the parameters."""
        return None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the penalty.

        Raises:
            ValueError: model or anchor lacks a leaf of ``importance``, or has it in another shape.
        """
        params, anchor, weight = map(tree.flatten, (model.params, self.anchor, self.importance))
        check_leaves("the importance of SI", weight, params)
        check_leaves("the importance of SI", weight, anchor, "the anchor")
        moved = (weight[path] * jnp.square(params[path] - anchor[path]) for path in weight)
        return self.strength * sum((jnp.sum(part) for part in moved), jnp.zeros(())), {}


class Tracked(NamedTuple):
    """The state of an optimiser that ``track`` wraps.

    Attributes:
        inner: the state of the optimiser itself.
        path: ω, for each trained entry the sum over updates of ``-gradient · update``.
        anchor: w* of the penalty that is part of the loss.
        pull: 2 c Ω of that penalty.
    """

    inner: Any
    path: PyTree
    anchor: PyTree
    pull: PyTree


def track(
    optimizer: optax.GradientTransformation, penalty: SI | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps ``optimizer`` to sum ω while it trains (equation 3): how much each move reduced the task's own loss.

    Labels must be 0 or 1, because other rates scale the update after the optimiser, where ω does not see it.

    Args:
        optimizer: any; its updates do not change.
        penalty: the ``SI`` term of the loss, if any. Its gradient does not belong to the task and is subtracted.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Tracked:
        # Separate arrays, because a train step donates the memory of each.
        anchor, pull, path = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        if penalty is not None:
            anchors, weights = tree.flatten(penalty.anchor), tree.flatten(penalty.importance)
            anchor = tree.map_with_path(lambda path, leaf: jnp.array(anchors.get(path, leaf)), anchor)
            pull = tree.map_with_path(
                lambda path, leaf: 2 * penalty.strength * jnp.array(weights.get(path, leaf)), pull
            )
        return Tracked(optimizer.init(params), path, anchor, pull)

    def update(
        gradients: PyTree, state: Tracked, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Tracked]:
        updates, inner = optimizer.update(gradients, state.inner, params, **extra)
        own = jax.tree.map(
            lambda g, pull, w, a: g - pull * (w - a), gradients, state.pull, params, state.anchor
        )
        path = jax.tree.map(lambda total, g, move: total - g * move, state.path, own, updates)
        return updates, state._replace(inner=inner, path=path)

    return optax.GradientTransformationExtraArgs(init, update)


def path_importance(
    state: Tracked, start: PyTree, end: PyTree, *, before: PyTree | None = None, damping: float = 0.1
) -> PyTree:
    """The importance Ω after a task: Ω of the earlier tasks plus ``ω / ((w_end - w_start)² + ξ)`` (equation 5).

    Args:
        state: the optimiser's state after the task.
        start: the parameters before the task.
        end: the parameters after it.
        before: Ω of the earlier tasks; leave out after the first task.
        damping: ξ; 0.1 in the paper.

    Returns:
        A nested dict of the leaves that trained, in this task or an earlier one.
    """
    path, first, last = map(tree.flatten, (state.path, start, end))
    old = {} if before is None else tree.flatten(before)
    new = {p: w / (jnp.square(last[p] - first[p]) + damping) for p, w in path.items()}
    return tree.nest({**old, **{p: old.get(p, 0.0) + value for p, value in new.items()}})
