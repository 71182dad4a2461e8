"""Averages that weight each model's parameters by how much they matter to it: Fisher merging and RegMean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import trace, tree
from jtl.errors import InputError
from jtl.merging.check import same
from jtl.model import Inputs, Mode, Model


def fisher_average(
    params: Sequence[PyTree],
    fishers: Sequence[PyTree],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
) -> PyTree:
    """Computes ``sum of weight * F * theta / sum of weight * F``, entry by entry.

    Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", https://arxiv.org/abs/2111.09832, equation
    4.

    Args:
        params: the models.
        fishers: the diagonal Fisher information of each, with the same structure (``jtl.finetune.fisher``).
        weights: of each model; by default equal.
        floor: lower bound of the Fisher, so that entries which matter to no model are averaged.

    Raises:
        ValueError: there are not equally many of each, or leaves differ.
    """
    same([*params, *fishers])
    weights = [1.0] * len(params) if weights is None else weights
    if not len(params) == len(fishers) == len(weights):
        raise InputError(
            f"{len(params)} models, {len(fishers)} Fishers and {len(weights)} weights: as many of each"
        )
    floored = [
        jax.tree.map(lambda f, w=weight: w * jnp.maximum(f, floor), own)
        for own, weight in zip(fishers, weights, strict=True)
    ]
    above = [jax.tree.map(jnp.multiply, f, p) for f, p in zip(floored, params, strict=True)]
    total = lambda trees: jax.tree.map(lambda *leaves: sum(leaves), *trees)  # noqa: E731
    return jax.tree.map(jnp.divide, total(above), total(floored))


def input_grams(model: Model, batches: Iterable[Inputs]) -> dict[str, Float[Array, "m m"]]:
    """X^T X of the inputs X (rows, m) of every Dense layer, by the path of its kernel, over all batches and calls.

    Padding counts like any other input of the layer; pass batches without it if that matters.

    Raises:
        ValueError: there are no batches, a layer has an adapter, or a layer is inside ``nn.scan``, ``nn.remat`` or
            ``nn.vmap``, where its inputs cannot be read one by one.
    """
    kernels = tree.flatten(model.params)

    def grams(model: Model, batch: Inputs) -> dict[str, Array]:
        found: dict[str, Array] = {}
        within: list[str] = []  # the layer that is running

        def watcher(module: nn.Module, path: str, x: Any, call: Callable[[], Any]) -> Any:
            if not isinstance(module, nn.Dense):
                return call()
            path = "/".join((*module.path, "kernel"))
            if within:
                raise InputError(
                    f"{within[0]} runs with another weight, of an adapter: give jtl.adapters.merge(model)"
                )
            if kernels[path].shape[:-1] != x.shape[-1:]:
                raise InputError(
                    f"{path} {kernels[path].shape} is a stack of scanned layers, whose inputs (..., {x.shape[-1]}) are "
                    "not seen one by one: give a model of unrolled layers"
                )
            rows = x.reshape(-1, x.shape[-1])
            found[path] = found.get(path, 0) + rows.T @ rows
            within.append(path)
            try:
                return call()
            finally:
                within.pop()

        with trace.watching(watcher):
            model.run(batch, Mode())
        return found

    total: dict[str, Array] | None = None
    compiled = jax.jit(grams)
    for batch in batches:
        try:
            own = compiled(model, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise InputError(
                "a Dense layer runs inside a transformation (nn.remat, nn.vmap), whose inputs are not seen outside: "
                "give a model of plain layers (jtl.model.with_base(model, module=...))"
            ) from error
        total = own if total is None else tree.add(total, own)
    if total is None:
        raise InputError("there are no batches to take Gram matrices of")
    return total


def regmean(
    params: Sequence[PyTree], grams: Sequence[Mapping[str, Float[Array, "m m"]]], shrink: float = 0.9
) -> PyTree:
    """RegMean: linear layers that best predict, in least squares, each model's own outputs on its own inputs.

    ``(sum G_i)^-1 sum G_i W_i`` with the off-diagonal entries of each Gram matrix multiplied by ``shrink``. Leaves
    without a Gram matrix are averaged. Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language
    Models", https://arxiv.org/abs/2212.09849, equation 2.

    Args:
        params: the models.
        grams: of each model on its own data: see ``input_grams``.
        shrink: 0.9 in the paper for most models; 1 is plain least squares.

    Raises:
        ValueError: models and Gram matrices do not fit together.
    """
    same(params)
    same(list(grams))
    if len(params) != len(grams):
        raise InputError(f"{len(params)} models and {len(grams)} sets of Gram matrices: as many of each")
    leaves = [tree.flatten(own) for own in params]
    if unknown := sorted(grams[0].keys() - leaves[0].keys()):
        raise InputError(f"Gram matrices of leaves that the models lack: {unknown[:5]}")
    merged = {path: sum(own[path] for own in leaves) / len(leaves) for path in leaves[0]}
    for path in grams[0]:
        shrunk = [shrink * g[path] + (1 - shrink) * jnp.diag(jnp.diag(g[path])) for g in grams]
        right = sum(g @ own[path] for g, own in zip(shrunk, leaves, strict=True))
        # The ridge keeps directions that no input has, which are undetermined, at the average of the models.
        total = jnp.stack(shrunk).sum(0)
        ridge = 1e-6 * jnp.trace(total) / len(total)
        system = total + ridge * jnp.eye(len(total))
        merged[path] = jnp.linalg.solve(system, right + ridge * merged[path])
    return tree.nest(merged)
