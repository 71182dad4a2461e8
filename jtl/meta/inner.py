"""The inner loop of meta-learning: ``adapt`` takes a few steps on the support set of one task.

It is a pure function, so a gradient can go through it (MAML) or around it (Reptile, iMAML), and tasks run under
``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.loss import Aux
from jtl.meta.rules import LEAVES, Rule, learned, updates_of
from jtl.model import Batch

TaskLoss = Callable[[PyTree, Batch, Array], tuple[Array, Aux]]
Rate = float | optax.GradientTransformation | Rule


def adapt(
    loss: TaskLoss,
    params: PyTree,
    support: Batch,
    key: Array,
    *,
    steps: int,
    rate: Rate,
    labels: PyTree | None = None,
    minibatch: int | None = None,
    first_order: bool = False,
    remat: bool = False,
    unroll: int = 1,
) -> PyTree:
    """Returns ``params`` after ``steps`` updates on ``support``.

    This is the inner loop of MAML (Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", https://arxiv.org/abs/1703.03400, section 2.2).

    Args:
        loss: ``(params, batch, key) -> (value, aux)``. Mind its scale: the rate that the paper gives for a *sum* of
            cross-entropies over N ways must be N times as large for ``Classify``, which is a mean.
        params: a tree of parameters; ``None`` is an absent leaf.
        support: the batch of one task.
        key: for dropout and the order of minibatches; each step gets its own.
        steps: number of updates, at least 1.
        rate: α of plain gradient descent; or an optax transformation, whose state starts afresh in every task; or
            learned rates (``MetaSGD``, ``PerStep``, ``MetaCurvature``). To differentiate through Adam give it an
            ``eps_root``, because the square root has no derivative at 0.
        labels: a tree of rates shaped like the parameters (``jtl.finetune``), which multiply each leaf's update; at 0
            a leaf does not adapt and is not differentiated. A schedule counts inner steps. By default all adapt.
        minibatch: rows of the support that a step sees, in a random order without repetition; by default all.
        first_order: stop the gradient of each step, so that no second derivative is taken.
        remat: recompute the forwards of a step when differentiating through it: memory for one step instead of all.
        unroll: steps written out in one iteration of the compiled loop. Unrolling all is a tenth faster on a CPU, but
            deep models compile longer.

    Returns:
        The adapted parameters.

    Raises:
        ValueError: there are no steps, nothing adapts, ``labels`` and ``params`` differ, or a rule lacks its leaves.

    >>> loss = lambda params, batch, key: (0.5 * jnp.sum((params["w"] - batch["y"]) ** 2), Aux({}, {}))
    >>> params, support = {"w": jnp.array([1.0])}, {"y": jnp.array([3.0])}
    >>> adapt(loss, params, support, jax.random.key(0), steps=2, rate=0.5)["w"].tolist()
    [2.5]
    """
    options = {"minibatch": minibatch, "first_order": first_order, "remat": remat, "unroll": unroll}
    return trajectory(loss, params, support, key, steps=steps, rate=rate, labels=labels, **options).params  # type: ignore[arg-type]


class Trajectory(NamedTuple):
    """The path of an inner loop.

    Attributes:
        params: after the last step.
        observed: what was observed after each step, stacked.
    """

    params: PyTree
    observed: Any


def trajectory(
    loss: TaskLoss,
    params: PyTree,
    support: Batch,
    key: Array,
    *,
    steps: int,
    rate: Rate,
    labels: PyTree | None = None,
    minibatch: int | None = None,
    first_order: bool = False,
    remat: bool = False,
    unroll: int = 1,
    observe: Callable[[PyTree], Any] | None = None,
) -> Trajectory:
    """``adapt`` with ``observe(params)`` after each step, for adaptation curves and losses over all steps."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    (moving, fixed), rates = split(params, labels)
    rule_leaves = learned(rate, params, moving)
    optimizer = _optimizer(rate)
    orders = _orders(support, steps, minibatch, key)

    def step(carry: tuple[PyTree, PyTree], number_and_rows: Any) -> tuple[tuple[PyTree, PyTree], Any]:
        (moving, memory), (number, rows) = carry, number_and_rows
        batch = support if rows is None else jax.tree.map(lambda x: jnp.asarray(x)[rows], support)
        step_key = jax.random.fold_in(key, number)
        gradients = jax.grad(lambda own: loss(tree.combine(own, fixed), batch, step_key)[0])(moving)
        if first_order:
            gradients = jax.lax.stop_gradient(gradients)
        if isinstance(rate, Rule):
            updates = updates_of(rate, rule_leaves, gradients, number)
        else:
            updates, memory = optimizer.update(gradients, memory, moving)
        updates = jax.tree.map(lambda u, r: u * (r(number) if callable(r) else r), updates, rates)
        moving = optax.apply_updates(moving, updates)
        return (moving, memory), None if observe is None else observe(tree.combine(moving, fixed))

    start = moving, optimizer.init(moving)
    body = jax.checkpoint(step) if remat else step
    (moving, _), observed = jax.lax.scan(body, start, (jnp.arange(steps), orders), unroll=unroll)
    return Trajectory(tree.combine(moving, fixed), observed)


def split(params: PyTree, labels: PyTree | None) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """Splits ``params`` into what adapts and what does not, and returns these and the labels of the former.

    The leaves of a rule never adapt.

    Raises:
        ValueError: nothing adapts, a leaf has no label, or an absent leaf has a label other than 0.
    """
    there = tree.flatten(params)
    if labels is None:
        given: dict[str, Any] = dict.fromkeys(there, 1.0)
    else:
        given = {path: label for path, label in tree.flatten(labels).items() if not _is_rule(path)}
        missing = sorted(path for path in there if path not in given and not _is_rule(path))
        if missing:
            raise InputError(
                f"the inner labels lack {missing[:5]}; make them from this model's own params (jtl.finetune)"
            )
        absent = sorted(path for path, label in given.items() if path not in there and _moves(label))
        if absent:
            raise InputError(
                f"the inner labels adapt {absent[:5]}, which the step's own labels freeze: let the step train "
                "them, or label them 0 here"
            )
    adapts = {path: _moves(given[path]) and not _is_rule(path) for path in there if path in given}
    if not any(adapts.values()):
        raise InputError(
            "nothing adapts: every inner label is 0; label at least one trained leaf with a rate"
        )
    mask = tree.map_with_path(lambda path, _: adapts.get(path, False), params)
    moving, fixed = tree.partition(params, mask)
    return (moving, fixed), tree.map_with_path(lambda path, _: given[path], moving)


def _moves(label: Any) -> bool:
    return callable(label) or label != 0


def _is_rule(path: str) -> bool:
    return path.split("/")[0] == LEAVES


def _optimizer(rate: Rate) -> optax.GradientTransformation:
    if isinstance(rate, optax.GradientTransformation):
        return rate
    return optax.identity() if isinstance(rate, Rule) else optax.sgd(rate)


def _orders(support: Batch, steps: int, minibatch: int | None, key: Array) -> Array | None:
    """The rows of each step, (steps, minibatch): one random order of all rows after another."""
    if minibatch is None:
        return None
    rows = jax.tree.leaves(support)[0].shape[0]
    if not 1 <= minibatch <= rows:
        raise InputError(f"minibatch must be 1 to {rows}, the rows of the support, got {minibatch}")
    passes = -(-steps * minibatch // rows)
    keys = jax.random.split(jax.random.fold_in(key, steps), passes)
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys).ravel()
    return order[: steps * minibatch].reshape(steps, minibatch)
