"""AdaLoRA's pruning: zeroes the least important singular values over all layers, as the rank budget shrinks.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
https://arxiv.org/abs/2303.10512, section 3.2, algorithm 1 and appendix A.

It is an optax transformation because the score needs the gradient and the pruning comes after the update. A mask in
the model's ``variables`` would see neither, and would keep a pruned value from ever coming back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jtl import tree
from jtl.errors import InputError

PARTS = ("p", "lambda", "q")

Triplets = dict[str, Array]  # by path, of the leaves "p", "lambda" and "q"


class AllocateState(NamedTuple):
    """The state of ``allocate``.

    Attributes:
        step: updates done.
        sensitivity: the smoothed sensitivity of each entry of P, Λ and Q, by path.
        uncertainty: its smoothed local variation.
        kept: which singular values the last update kept, by path of ``lambda``.
        inner: the state of the optimiser.
    """

    step: Int[Array, ""]
    sensitivity: Triplets
    uncertainty: Triplets
    kept: dict[str, Bool[Array, "... _"]]
    inner: PyTree


def allocate(
    optimizer: optax.GradientTransformation,
    *,
    rank: float | int,
    steps: int,
    start: int,
    final: int,
    every: int = 1,
    decay: tuple[float, float] = (0.85, 0.85),
    name: str = "adalora",
) -> optax.GradientTransformation:
    """Wraps ``optimizer`` to keep only the most important singular values of AdaLoRA after each update.

    An entry w with gradient g has the sensitivity I = |w g|. Smoothing it gives I' (decay beta1), smoothing |I - I'|
    gives its uncertainty U (decay beta2), and s = I' U is its importance. A triplet's score is s(λ) plus the means of
    s over its column of P and its row of Q. Of all λ in the model, the ``budget`` with the highest scores keep their
    update and the others become 0. The vectors of a pruned λ still train, so it may come back until the last ``final``
    updates, which prune by the scores fixed at that point.

    λ must train at rate 1, because a label multiplies the update, and here the update includes the pruning. At another
    rate the next update is NaN, at which ``jtl.train.fit`` stops.

    Args:
        optimizer: any; its gradients are those of the whole loss, with ``Orthogonality``.
        rank: the final mean rank over the adapted weights (each layer of a stack counts as one).
        steps: the updates of the whole run, T.
        start: updates before the first pruning, t_i.
        final: updates at the end, t_f, with the budget at its target and the scores fixed.
        every: updates between two prunings, ΔT.
        decay: beta1 and beta2.
        name: of the adapter.

    Raises:
        ValueError: ``start + final`` leaves no update for pruning, or another number is invalid. At ``init``: no
            leaves of the adapter train, only some of the three of a layer do, or ``rank`` is above theirs.
    """
    if not (0 <= start and 0 <= final and start + final < steps and every >= 1 and rank >= 0):
        raise InputError(
            "need 0 <= start, 0 <= final, start + final < steps, every >= 1 and rank >= 0; got "
            f"start={start}, final={final}, steps={steps}, every={every}, rank={rank}"
        )
    if not all(0 < beta < 1 for beta in decay):
        raise InputError(f"decay must be two numbers in (0, 1), got {decay}")

    def init(params: PyTree) -> AllocateState:
        own = _triplets(params, name)
        values = {path: leaf for path, leaf in own.items() if path.endswith("/lambda")}
        total, matrices = sum(v.size for v in values.values()), sum(_matrices(v) for v in values.values())
        if rank * matrices > total:
            raise InputError(f"rank={rank} is above the adapter's mean rank, {total / matrices:g}")
        zeros = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in own.items()}
        kept = {path: jnp.ones(leaf.shape, bool) for path, leaf in values.items()}
        # Two separate trees of zeros, because the step donates the memory of each.
        return AllocateState(
            jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.array, zeros), kept, optimizer.init(params)
        )

    def update(
        gradients: PyTree, state: AllocateState, params: PyTree | None = None
    ) -> tuple[PyTree, AllocateState]:
        if params is None:
            raise InputError("allocate needs the parameters: call update(gradients, state, params)")
        own, slopes = _triplets(params, name), _triplets(gradients, name)
        scoring = state.step < steps - final
        sensitivity, uncertainty = {}, {}
        for path, leaf in own.items():
            now = jnp.abs(leaf.astype(jnp.float32) * slopes[path].astype(jnp.float32))
            old, old_spread = state.sensitivity[path], state.uncertainty[path]
            smooth = decay[0] * old + (1 - decay[0]) * now
            spread = decay[1] * old_spread + (1 - decay[1]) * jnp.abs(now - smooth)
            sensitivity[path] = jnp.where(scoring, smooth, old)
            uncertainty[path] = jnp.where(scoring, spread, old_spread)
        score = scores({path: sensitivity[path] * uncertainty[path] for path in own})
        target = round(rank * sum(map(_matrices, score.values())))
        left = budget(state.step, sum(s.size for s in score.values()), target, steps, start, final)
        pruning = (state.step >= start) & (~scoring | (state.step % every == 0))
        kept = {path: mask | ~pruning for path, mask in top(score, left).items()}

        updates, inner = optimizer.update(gradients, state.inner, params)

        def pruned(path: str, update: Array) -> Array:
            if path not in kept:
                return update
            # A pruned value must be 0 before this update; if it is not, a label scaled the pruning.
            intact = jnp.all(state.kept[path] | (own[path] == 0))
            return jnp.where(intact, jnp.where(kept[path], update, -own[path].astype(update.dtype)), jnp.nan)

        updates = tree.map_with_path(pruned, updates)
        return updates, AllocateState(state.step + 1, sensitivity, uncertainty, kept, inner)

    return optax.GradientTransformation(init, update)


def budget(
    step: Int[Array, ""] | int, total: int, target: int, steps: int, start: int, final: int
) -> Int[Array, ""]:
    """How many singular values update number ``step`` (from 0) keeps: ``total``, then a cubic decrease to ``target``.

    As in the authors' code and PEFT: target + (total - target) (1 - (t - t_i) / (T - t_i - t_f))^3, rounded down. The
    form printed in appendix A has t - t_i - t_f in the numerator; it would start above ``total`` and jump at its end.

    >>> [int(budget(t, 10, 2, steps=12, start=2, final=2)) for t in (0, 2, 4, 6, 10, 11)]
    [10, 10, 5, 3, 2, 2]
    """
    left = 1 - jnp.clip((step - start) / (steps - final - start), 0.0, 1.0)
    return jnp.floor(target + (total - target) * left**3).astype(jnp.int32)


def scores(importance: Triplets) -> dict[str, Float[Array, "... _"]]:
    """Returns the score of each triplet, by path of ``lambda``, from the importance of each entry of P, Λ and Q."""
    return {
        path: value
        + importance[path.removesuffix("lambda") + "p"].mean(-2)
        + importance[path.removesuffix("lambda") + "q"].mean(-1)
        for path, value in importance.items()
        if path.endswith("/lambda")
    }


def top(score: dict[str, Array], count: Int[Array, ""] | int) -> dict[str, Bool[Array, "... _"]]:
    """Returns masks of the ``count`` highest entries over all arrays; of equal entries, the first.

    >>> top({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 1.0])}, 3)
    {'a': Array([ True,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    flat = jnp.concatenate([array.ravel() for array in score.values()])
    order = jnp.argsort(flat, descending=True, stable=True)
    mask = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(len(flat)) < count)
    ends = np.cumsum([array.size for array in score.values()])[:-1]
    parts = jnp.split(mask, ends)
    return {path: part.reshape(array.shape) for (path, array), part in zip(score.items(), parts, strict=True)}


def _matrices(values: Array) -> int:
    """How many weights the singular values (..., r) belong to."""
    return int(np.prod(values.shape[:-1], dtype=int))


def _triplets(params: PyTree, name: str) -> Triplets:
    """The adapter's leaves, by path; raises ValueError if none trains, or only a part of a layer's."""
    places = tuple(f"/{name}/{leaf}" for leaf in PARTS)
    own = {path: leaf for path, leaf in tree.flatten(params).items() if f"/{path}".endswith(places)}
    if not own:
        raise InputError(f"allocate: no leaf of an adapter {name!r} trains; label its p, lambda and q 1")
    layers = {path.rpartition("/")[0] for path in own}
    frozen = sorted({f"{layer}/{leaf}" for layer in layers for leaf in PARTS} - set(own))
    if frozen:
        raise InputError(f"allocate: {frozen[0]} does not train; label p, lambda and q alike")
    return own
