"""iMAML: the meta-gradient by the implicit function theorem, from the end of the inner loop alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.loss import Aux
from jtl.meta.inner import TaskLoss, adapt, split
from jtl.meta.tasks import Graded, mean_over_tasks, query_of
from jtl.model import Batch


def imaml(
    *,
    steps: int,
    rate: float | optax.GradientTransformation,
    regularisation: float,
    cg_steps: int = 5,
    labels: PyTree | None = None,
    chunk: int | None = None,
) -> Any:
    """Implicit MAML, for ``make_step(loss, optimizer, gradient=imaml(steps=16, rate=0.1, regularisation=2.0))``.

    The inner problem is φ = argmin L_support(φ) + λ/2·||φ − θ||². The meta-gradient solves (I + H/λ) g = ∇L_query(φ),
    H the Hessian of L_support at φ, by conjugate gradients (Rajeswaran et al. 2019, "Meta-Learning with Implicit
    Gradients", https://arxiv.org/abs/1909.04630). Memory does not grow with ``steps``. The gradient is exact only at
    the inner minimum, so take enough steps. The metric ``cg_residual`` is ||∇L_query − (I + H/λ) g|| / ||∇L_query||, 0
    when conjugate gradients have converged; where H has eigenvalues below −λ they may not.

    Args:
        steps: inner steps towards the minimum.
        rate: of the inner loop: a number, or an optax transformation.
        regularisation: λ.
        cg_steps: the maximum number of steps of conjugate gradients.
        labels: which leaves adapt: see ``adapt``. The others, shared by all tasks, get their gradient too.
        chunk: tasks to run at a time; by default all.

    Raises:
        ValueError: ``regularisation`` is not above 0.
    """
    if regularisation <= 0:
        raise InputError(f"regularisation must be over 0, got {regularisation}: iMAML needs a proximal term")

    def gradient(loss: TaskLoss, trained: PyTree, batch: Batch, key: Array) -> Graded:
        def graded(trained: PyTree, episode: Any, key: Array) -> Graded:
            return _graded(loss, trained, episode, key)

        return mean_over_tasks(graded, trained, batch, key, chunk)

    def _graded(loss: TaskLoss, trained: PyTree, episode: Any, key: Array) -> Graded:
        inner_key, query_key = jax.random.split(key)
        support, query = episode["support"], query_of(episode)
        (start, shared), _ = split(trained, labels)

        def proximal(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Aux]:
            value, aux = loss(params, batch, key)
            away = tree.sub(split(params, labels)[0][0], start)
            return value + regularisation / 2 * tree.vdot(away, away), aux

        adapted = adapt(proximal, trained, support, inner_key, steps=steps, rate=rate, labels=labels)
        (end, _), _ = split(adapted, labels)

        def on_support(end: PyTree, shared: PyTree) -> Array:
            # The key of the last inner step, so that dropout, if any, is the same as in the problem solved there.
            return loss(tree.combine(end, shared), support, jax.random.fold_in(inner_key, steps - 1))[0]

        def on_query(end: PyTree, shared: PyTree) -> tuple[Array, Aux]:
            return loss(tree.combine(end, shared), query, query_key)

        (value, aux), (own, others) = jax.value_and_grad(on_query, (0, 1), has_aux=True)(end, shared)
        # Reverse over reverse, because some layers have no forward mode.
        slope = jax.grad(on_support, (0, 1))
        curve = jax.vjp(slope, end, shared)[1]

        def system(v: PyTree) -> PyTree:
            zero = jax.tree.map(jnp.zeros_like, shared)
            product, _ = curve((v, zero))
            return tree.add(v, tree.scale(1 / regularisation, product))

        solved, _ = jax.scipy.sparse.linalg.cg(system, own, maxiter=cg_steps, tol=1e-7)
        residual = tree.norm(tree.sub(own, system(solved))) / jnp.maximum(tree.norm(own), 1e-30)
        # The derivative of the minimum by the shared leaves: −(H + λI)⁻¹ ∂²L_support / ∂φ ∂shared.
        _, cross = curve((solved, jax.tree.map(jnp.zeros_like, shared)))
        others = tree.sub(others, tree.scale(1 / regularisation, cross))
        metrics = {**aux.metrics, "cg_residual": residual}
        return (value, Aux(metrics, aux.state)), tree.combine(solved, others)

    return gradient
