"""Elastic weight consolidation (EWC) and the diagonal Fisher information.

EWC pulls each parameter towards its value after an earlier task, weighted by how much that task depends on it: use it
to fine-tune, or to learn tasks one after another, without forgetting. Kirkpatrick et al. 2017, "Overcoming
catastrophic forgetting in neural networks", https://arxiv.org/abs/1612.00796.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.finetune.anchor import check_leaves
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs


class EWC(Loss):
    """The EWC penalty, ``strength/2 · Σ_i F_i (w_i - w*_i)²``, over the leaves of ``fisher``.

    Kirkpatrick et al. 2017, equation 3.

    Attributes:
        anchor: nested dict of w*, the parameters after the earlier task; it may hold more leaves than ``fisher``.
        fisher: nested dict of F, from ``fisher``.
        strength: lambda.

    >>> from jtl.wrap import function
    >>> model = function(lambda params: params, {"w": jnp.array([3.0, 0.0])})
    >>> penalty = EWC({"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([2.0, 0.5])}, strength=1.0)
    >>> float(penalty(model, {}, None)[0])  # (2 · 2² + 0.5 · 1²) / 2
    4.25
    """

    anchor: PyTree
    fisher: PyTree
    strength: Any

    def mode(self) -> None:
        """Returns None: the penalty reads only the parameters."""
        return None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the penalty.

        Raises:
            ValueError: model or anchor lacks a leaf of ``fisher``, or has it in another shape.
        """
        params, anchor, weight = map(tree.flatten, (model.params, self.anchor, self.fisher))
        check_leaves("the Fisher information of EWC", weight, params)
        check_leaves("the Fisher information of EWC", weight, anchor, "the anchor")
        moved = (weight[path] * jnp.square(params[path] - anchor[path]) for path in weight)
        return self.strength / 2 * sum((jnp.sum(part) for part in moved), jnp.zeros(())), {}


def consolidate(earlier: EWC, later: EWC) -> EWC:
    """Merges the penalties of two tasks into one, so that the cost does not grow with the number of tasks.

    The result differs from the sum of the two by a constant:
    ``λ₁ F₁ (w - w₁)² + λ₂ F₂ (w - w₂)² = F (w - w̄)² + const``, with ``F = λ₁ F₁ + λ₂ F₂`` and ``w̄``, for each entry,
    the mean of ``w₁`` and ``w₂`` under these weights (``w₂`` where both weights are 0). Its strength is 1.

    Args:
        earlier: the penalty of the earlier tasks.
        later: the penalty of the later task.

    Raises:
        ValueError: the two penalties cover different leaves.

    >>> first, second = EWC({"w": 0.0}, {"w": 1.0}, strength=3.0), EWC({"w": 4.0}, {"w": 1.0}, strength=1.0)
    >>> both = consolidate(first, second)
    >>> float(both.fisher["w"]), float(both.anchor["w"])
    (4.0, 1.0)
    """
    old, new = tree.flatten(earlier.fisher), tree.flatten(later.fisher)
    check_leaves("the earlier Fisher information", old, new, "the later one")
    check_leaves("the later Fisher information", new, old, "the earlier one")
    before, after = tree.flatten(earlier.anchor), tree.flatten(later.anchor)
    total, centre = {}, {}
    for path in new:
        kept = earlier.strength * old[path]
        total[path] = kept + later.strength * new[path]
        share = jnp.where(total[path] > 0, kept / jnp.where(total[path] > 0, total[path], 1), 0)
        centre[path] = after[path] + share * (before[path] - after[path])
    return EWC(tree.nest(centre), tree.nest(total), jnp.float32(1))


def fisher(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    mode: str = "exact",
    where: str = ".*",
    chunk: int = 8,
    key: Array | None = None,
) -> PyTree:
    """Estimates the diagonal Fisher information of a classifier: the mean over examples of squared gradients.

    ``F_i = E_x E_y (d log p(y|x) / d w_i)²``. Each gradient is that of *one* example: the square of a minibatch's mean
    gradient is a different, far smaller number. The forward has no dropout and uses running normalisation statistics.

    Args:
        model: returns ``logits`` (B, C).
        batches: mappings of arrays whose first axis is rows; rows of ``weight`` 0 do not count.
        mode: how y is drawn. ``"exact"``: the expectation over p(y|x), which takes C gradients per example;
            ``"sampled"``: one draw from p(y|x); ``"empirical"``: the row's own ``label``. The last is the empirical
            Fisher, which does not estimate the Fisher (Kunstner, Hennig and Balles 2019, "Limitations of the Empirical
            Fisher Approximation for Natural Gradient Descent", https://arxiv.org/abs/1905.12558).
        where: regex of the paths to include.
        chunk: examples whose gradients are held at once; memory grows with chunk × parameters.
        key: for ``"sampled"``.

    Returns:
        A nested dict of float32 leaves, one for each leaf of ``params`` that matches ``where``.

    Raises:
        ValueError: an unknown mode, no rows, ``"sampled"`` without a key or ``"empirical"`` without labels.
        RuleError: no path matches ``where``.
    """
    if mode not in ("exact", "sampled", "empirical"):
        raise InputError(f"mode must be 'exact', 'sampled' or 'empirical', got {mode!r}")
    if mode == "sampled" and key is None:
        raise InputError("fisher(mode='sampled') draws labels: pass key=")
    chosen, fixed = tree.partition(model.params, tree.matches(where, model.params))
    one = {"exact": _exact, "sampled": _sampled, "empirical": _empirical}[mode]
    key = jax.random.key(0) if key is None else key

    fixed_model = model.with_params(fixed)
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), chosen)
    count = 0.0
    for number, batch in enumerate(batches):
        if mode == "empirical" and "label" not in batch:
            raise InputError(f"fisher(mode='empirical') needs batch['label']; the batch has {sorted(batch)}")
        rows = len(jax.tree.leaves(batch)[0])
        weights = jnp.asarray(batch.get("weight", jnp.ones(rows)), jnp.float32)
        keys = jax.random.split(jax.random.fold_in(key, number), rows)
        for start in range(0, rows, chunk):
            # The last chunk is padded with rows of weight 0, so that all chunks share one compilation.
            index = jnp.minimum(jnp.arange(start, start + chunk), rows - 1)
            real = jnp.arange(start, start + chunk) < rows
            part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], dict(batch))
            total = _add(one, total, chosen, fixed_model, part, weights[index] * real, keys[index])
        count += float(weights.sum())
    if not count:
        raise InputError("fisher: the batches hold no row of weight over 0")
    return tree.nest(tree.flatten(tree.scale(1 / count, total)))


LogP = Callable[[PyTree], Array]


# Outside ``fisher``, so that models with the same function share the compilation.
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(
    one: Callable[..., PyTree],
    total: PyTree,
    chosen: PyTree,
    model: Model,
    rows: Batch,
    weights: Array,
    keys: Array,
) -> PyTree:
    """``total`` plus the weighted sum of the rows' squared gradients, computed by ``one``."""

    def squares(row: Batch, row_key: Array) -> PyTree:
        def log_p(leaves: PyTree) -> Float[Array, " C"]:
            whole = model.with_params(tree.combine(leaves, model.params))
            logits = whole(jax.tree.map(lambda x: x[None], row))["logits"][0]
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        return one(log_p, chosen, row, row_key)

    parts = jax.vmap(squares)(rows, keys)
    return jax.tree.map(lambda t, part: t + jnp.tensordot(weights, part, 1), total, parts)


def _exact(log_p: LogP, leaves: PyTree, row: Batch, key: Array) -> PyTree:
    values, pull = jax.vjp(log_p, leaves)

    def one_class(total: PyTree, y: Array) -> tuple[PyTree, None]:
        (gradient,) = pull(jax.nn.one_hot(y, len(values)))
        return jax.tree.map(lambda t, g: t + jnp.exp(values[y]) * jnp.square(g), total, gradient), None

    # One class at a time: memory does not grow with C.
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), leaves)
    return jax.lax.scan(one_class, zero, jnp.arange(len(values)))[0]


def _squared(log_p: LogP, leaves: PyTree, y: Array) -> PyTree:
    return jax.tree.map(jnp.square, jax.grad(lambda leaves: log_p(leaves)[y])(leaves))


def _sampled(log_p: LogP, leaves: PyTree, row: Any, key: Array) -> PyTree:
    return _squared(log_p, leaves, jax.random.categorical(key, log_p(leaves)))


def _empirical(log_p: LogP, leaves: PyTree, row: Any, key: Array) -> PyTree:
    return _squared(log_p, leaves, row["label"])
