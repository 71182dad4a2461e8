"""How much a task relies on each column in each layer: average Fisher and average perturbation sensitivity.

Rusu et al. 2016, "Progressive Neural Networks", https://arxiv.org/abs/1606.04671, section 3 and appendix A. A layer's
activations are the inputs of a block, so they are named after the block: ``head`` is the last hidden layer. They are
normalised: each feature is measured in units of its own standard deviation over examples (and positions, if any).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jtl.errors import InputError
from jtl.model import Batch, Model
from jtl.progressive.columns import SHIFT, Columns

Sensitivity = dict[str, Float[np.ndarray, " k"]]
SCALES = tuple(2.0**power for power in range(-4, 8))


def fisher_sensitivity(model: Model, batches: Iterable[Mapping[str, Any]]) -> Sensitivity:
    """AFS(i, k): the share of column k in the outputs' Fisher information about the activations of layer i.

    The Fisher information of feature m is ``E_x E_y (d log p(y|x) / d ĥ(m))²`` over *single examples* and the model's
    own p(y|x), with the exact expectation over y. A feature map is shifted as a whole: its gradient is summed over
    positions before it is squared. ``AFS(i, k) = Σ_m F_i^k(m) / Σ_k Σ_m F_i^k(m)``. (The paper divides feature by
    feature, unit m of one column by the units m of all, and then sums. This needs columns of equal width and pairs
    unrelated units.)

    Args:
        model: a grown model, for the task of its last column; it returns ``logits`` (B, C).
        batches: mappings of arrays; rows of ``weight`` 0 do not count.

    Returns:
        For each block with a lateral, the shares of columns 1 ... k, which sum to 1.

    Raises:
        ValueError: the model has not grown or has no laterals, or there are no rows.
    """
    return _shares(_measure(model, batches)["fisher"], _places(model))


def perturbation_sensitivity(
    model: Model,
    batches: Sequence[Mapping[str, Any]],
    *,
    key: Array,
    scales: Sequence[float] = SCALES,
) -> Sensitivity:
    """APS(i, k): column k's share of the precision of the noise that halves the accuracy, ``Λ_i^k / Σ_k Λ_i^k``.

    Gaussian noise of σ standard deviations is added to all activations of one layer of one column. Λ = 1/σ² at the σ
    where the accuracy above chance 1/C falls to half of its value without noise (the paper's games have no chance
    level to subtract). σ is interpolated between two of ``scales``, linearly in log σ. Λ is 0 for a layer whose
    accuracy no scale halves.

    Args:
        model: a grown model, for the task of its last column; it returns ``logits`` (B, C).
        batches: mappings of arrays with ``label``, all of one shape; all are evaluated for every layer and scale.
        key: for the noise.
        scales: values of σ to try, ascending.

    Returns:
        As ``fisher_sensitivity``; NaN for a layer that no noise disturbs.

    Raises:
        ValueError: as ``fisher_sensitivity``; or the model is no better than chance.
    """
    places = _places(model)
    spread = jax.tree.map(np.sqrt, _measure(model, batches)["variance"])
    off = jax.tree.map(lambda _: 0.0, spread)

    def accuracy(scale: PyTree) -> tuple[float, float]:
        right = rows = 0.0
        for number, batch in enumerate(batches):
            own = jax.random.fold_in(key, number)
            hits, count, chance = _disturbed(model, dict(batch), spread, scale, own)
            right, rows = right + float(hits), rows + float(count)
        return right / rows, float(chance)

    clean, chance = accuracy(off)
    if clean <= chance:
        raise InputError(
            f"the accuracy is {clean:.3f}, that of chance {chance:.3f}: there is nothing to halve"
        )
    half = chance + (clean - chance) / 2
    precision: dict[str, dict[str, float]] = {column: {} for column in spread}
    for column, blocks in spread.items():
        for block in blocks:
            found = [clean]
            for sigma in scales:
                scale = {**off, column: {**off[column], block: float(sigma)}}
                found.append(accuracy(scale)[0])
                if found[-1] <= half:
                    break
            precision[column][block] = _precision(scales, found[1:], clean, half)
    return _shares(precision, places)


def _precision(scales: Sequence[float], found: Sequence[float], clean: float, half: float) -> float:
    """1/σ² where the accuracies ``found`` at the first ``scales`` cross ``half``; 0 if they do not.

    >>> _precision((1.0, 2.0, 4.0), (0.9, 0.6, 0.4), 1.0, 0.5)  # half way between 2 and 4, in log σ
    0.125
    """
    if found[-1] > half:
        return 0.0
    last = len(found) - 1
    if last == 0:
        return float(scales[0] ** -2)
    above, below = found[-2], found[-1]
    share = (above - half) / (above - below)
    power = (1 - share) * np.log2(scales[last - 1]) + share * np.log2(scales[last])
    return float(np.round(2.0 ** (-2 * power), 12))


# --- activations -----------------------------------------------------------------------------------


def _places(model: Model) -> dict[str, list[int]]:
    """For each block with a lateral in the last column, the columns in which its inputs matter."""
    technique = next((t for t in model.techniques if isinstance(t, Columns)), None)
    if technique is None:
        raise InputError("the model has one column: grow it first")
    paths = [lateral.path for lateral in technique.columns[-1].laterals]
    if not paths:
        raise InputError("the last column has no laterals, so earlier columns do not reach its outputs")
    ran = sorted(technique.needed())
    return {path: [number for number in ran if path in technique.blocks(number)] for path in paths}


def _shares(values: Mapping[str, Mapping[str, Any]], places: Mapping[str, list[int]]) -> Sensitivity:
    last = max(number for numbers in places.values() for number in numbers)
    found = {}
    for path, numbers in places.items():
        own = np.zeros(last)
        for number in numbers:
            own[number - 1] = np.sum(values[str(number)][path])
        found[path] = own / own.sum() if own.sum() > 0 else np.full(last, np.nan)
    return found


def _shifted(model: Model, shift: PyTree) -> Model:
    return model.replace(variables={**model.variables, SHIFT: shift})


def _measure(model: Model, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By column and block, for every feature: the variance, and the Fisher information of normalised activations."""
    _places(model)
    total: Any = None
    for batch in batches:
        part = jax.device_get(_sums(model, dict(batch)))
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None or not total["rows"]:
        raise InputError("the batches hold no row of weight over 0")
    mean = jax.tree.map(lambda s, n: s / n, total["sum"], total["count"])
    variance = jax.tree.map(
        lambda s, n, m: np.maximum(s / n - m**2, 0.0), total["square"], total["count"], mean
    )
    fisher = jax.tree.map(lambda f, v: f / total["rows"] * v, total["fisher"], variance)
    return {"variance": variance, "fisher": fisher}


@jax.jit
def _sums(model: Model, batch: Batch) -> dict[str, Any]:
    """Sums over the rows of a batch: of activations, of their squares, and of squared gradients."""
    rows = len(jax.tree.leaves(batch)[0])
    weights = jnp.asarray(batch.get("weight", jnp.ones(rows)), jnp.float32)
    hidden = _shifted(model, {})(batch)["hidden"]
    counted = jax.tree.map(lambda h: _counted(h, weights, batch), hidden)
    zeros = jax.tree.map(lambda h: jnp.zeros((1,) * (h.ndim - 1) + h.shape[-1:]), hidden)

    def squares(row: Batch) -> PyTree:
        def log_p(shift: PyTree) -> Float[Array, " C"]:
            one = jax.tree.map(lambda x: x[None], row)
            return jax.nn.log_softmax(_shifted(model, shift)(one)["logits"][0].astype(jnp.float32))

        values, pull = jax.vjp(log_p, zeros)
        gradients = jax.vmap(lambda y: pull(y)[0])(jnp.eye(len(values)))
        return jax.tree.map(lambda g: jnp.tensordot(jnp.exp(values), jnp.square(g), 1).ravel(), gradients)

    def over(fn: Any) -> PyTree:
        return jax.tree.map(lambda h, w: fn(h.astype(jnp.float32), w), hidden, counted)

    return {
        "rows": weights.sum(),
        "sum": over(lambda h, w: jnp.sum(h * w, range(h.ndim - 1))),
        "square": over(lambda h, w: jnp.sum(jnp.square(h) * w, range(h.ndim - 1))),
        "count": over(lambda h, w: jnp.sum(jnp.broadcast_to(w, (*h.shape[:-1], 1)))),
        "fisher": jax.tree.map(lambda f: jnp.tensordot(weights, f, 1), jax.vmap(squares)(batch)),
    }


def _counted(h: Array, weights: Array, batch: Batch) -> Array:
    """The weight of each position of activations (B, ..., n): 0 for padding tokens and rows."""
    weights = weights.reshape(-1, *(1,) * (h.ndim - 1))
    mask = batch.get("attention_mask")
    if mask is None or h.ndim != 3 or mask.shape != h.shape[:2]:
        return weights
    return weights * (mask[..., None] != 0)


@jax.jit
def _disturbed(
    model: Model, batch: Batch, spread: PyTree, scale: PyTree, key: Array
) -> tuple[Array, Array, float]:
    """The number of rows classified correctly under noise, the number of rows, and chance accuracy."""
    hidden = jax.eval_shape(lambda model, batch: _shifted(model, {})(batch)["hidden"], model, batch)
    leaves, structure = jax.tree.flatten(hidden)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def noise(h: Any, s: Array, times: Array, key: Array) -> Array:
        unit = jnp.asarray(s, jnp.float32).reshape((1,) * (len(h.shape) - 1) + h.shape[-1:])
        return times * unit * jax.random.normal(key, h.shape)

    logits = _shifted(model, jax.tree.map(noise, hidden, spread, scale, keys))(batch)["logits"]
    weight = batch.get("weight", jnp.ones(len(logits)))
    hits = jnp.argmax(logits, -1) == batch["label"]
    return jnp.sum(weight * hits), jnp.sum(weight), 1 / logits.shape[-1]
