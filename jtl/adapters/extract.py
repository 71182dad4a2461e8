"""Extracts a LoRA from two models: the best rank-r approximation of the difference of their weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import tree
from jtl.adapters.insert import Adapter, check_free, place
from jtl.adapters.lora import LoRA, check_rank
from jtl.adapters.site import Site, find
from jtl.errors import InputError
from jtl.model import Inputs, Model


def extract(
    start: Model, tuned: Model, *, rank: int, where: str, name: str = "lora", batch: Inputs | None = None
) -> Model:
    """Returns ``start`` with the LoRA nearest to ``tuned``, by truncated SVD of each weight's difference.

    No A·B of rank r is nearer in the Frobenius norm (Eckart and Young 1936). Leaves that ``where`` does not match stay
    those of ``start``.

    Args:
        start: the model before fine-tuning.
        tuned: the model after fine-tuning, with its adapters merged. At the layers that ``where`` matches, its leaves
            must have the same paths and shapes.
        rank: r.
        where: regular expression of module paths: see ``jtl.adapters.find``.
        name: of the adapter.
        batch: see ``jtl.adapters.insert``.

    Raises:
        ValueError: ``tuned`` has an adapter, lacks such a leaf or has another shape there, or ``start`` has an adapter
            there or one of that name.
    """
    if there := [technique.name for technique in tuned.techniques if isinstance(technique, Adapter)]:
        raise InputError(
            f"the tuned model has the adapters {there}, which are no part of its weights: pass "
            "jtl.adapters.merge(tuned)"
        )
    sites = find(start, where, batch)
    check_free(start, name, sites)
    before, after = tree.flatten(start.params), tree.flatten(tuned.params)
    leaves: dict[str, Array] = {}
    for site in sites:
        old, new = before[place(site)], after.get(place(site))
        if new is None or new.shape != old.shape:
            found = "nothing" if new is None else f"shape {new.shape}"
            raise InputError(f"{place(site)}: the tuned model has {found} where {old.shape} is needed")
        factors = partial(_factors, site, check_rank(site, rank))
        for _ in site.stack:
            factors = jax.vmap(factors)
        a, b = factors(new.astype(jnp.float32) - old.astype(jnp.float32))
        leaves |= {place(site, name, "a"): a.astype(old.dtype), place(site, name, "b"): b.astype(old.dtype)}
    return start.with_technique(Adapter(name, LoRA(rank, float(rank)), sites), tree.nest(leaves))


def _factors(site: Site, rank: int, change: Array) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    u, s, v = jnp.linalg.svd(site.matrix(change), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None], root[:, None] * v[:rank]
