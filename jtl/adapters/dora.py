"""DoRA: LoRA on the direction of each weight column, plus a trained magnitude for each output.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353, equation 5. The norm
takes no gradient, as its section 4.3 proposes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.adapters.insert import insert
from jtl.adapters.lora import LoRA, rules
from jtl.adapters.method import Leaves, Matrix, Pattern
from jtl.adapters.site import QUERIES_AND_VALUES, Site
from jtl.model import Inputs, Model


@dataclass(frozen=True)
class DoRA(LoRA):
    """The method behind ``dora``: each column of W + s A·B, divided by its length, times its magnitude."""

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """LoRA's start, and the lengths of W's columns as magnitudes."""
        lengths = jnp.linalg.norm(weight.astype(jnp.float32), axis=0)
        return {**super().init(site, weight, key), "magnitude": lengths.astype(weight.dtype)}

    def columns(self, site: Site, weight: Matrix, leaves: Leaves) -> Float[Array, " n"]:
        """Returns the magnitude of each column of W + s A·B over its length, in float32, without forming A·B.

        For each column |W + AB|^2 = |W|^2 + 2 <W, AB> + |AB|^2, with <W, AB> = <A^T W, B>. A column of zeros has no
        direction: its factor is 1, so that B can learn one.
        """
        parts = (*self.factors(site, leaves), weight)
        a, b, weight = (jax.lax.stop_gradient(part.astype(jnp.float32)) for part in parts)
        square = (weight**2).sum(0) + (b * (2 * (a.T @ weight) + (a.T @ a) @ b)).sum(0)
        length = jnp.sqrt(jnp.where(square > 0, square, 1))
        return jnp.where(square > 0, leaves["magnitude"] / length, 1)


def dora(
    model: Model,
    *,
    rank: int | Pattern = 8,
    alpha: float | Pattern | None = None,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    stabilised: bool = False,
    dropout: float = 0.0,
    name: str = "dora",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with DoRA at the layers that ``where`` matches; arguments as in ``jtl.adapters.lora``."""
    method = DoRA(*rules(rank, alpha), stabilised, dropout)
    return insert(model, method, where=where, key=key, name=name, batch=batch)
