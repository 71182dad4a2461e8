"""DoRA: the direction of W + s A·B and a magnitude for each output.

Liu et al. 2024: "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353, equation 5; the
norm takes no gradient, as its section 4.3 proposes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.adapters.insert import insert
from jtl.adapters.lora import LoRA, rules
from jtl.adapters.method import Leaves, Matrix, Pattern
from jtl.adapters.site import Site
from jtl.model import Batch, Model


@dataclass(frozen=True)
class DoRA(LoRA):
    """The method behind ``dora``: a column of W + s A·B over its length, times its magnitude."""

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """LoRA's start, and the lengths of W's columns."""
        return {**super().init(site, weight, key), "magnitude": jnp.linalg.norm(weight, axis=0)}

    def columns(self, site: Site, weight: Matrix, leaves: Leaves) -> Float[Array, " n"]:
        """The magnitude of each column of W + s A·B over its length, which is taken without forming A·B.

        |W + AB|^2 = |W|^2 + 2 <W, AB> + |AB|^2 for each column, with <W, AB> = <A^T W, B>.
        """
        a, b, weight = jax.lax.stop_gradient((*self.factors(site, leaves), weight))
        square = (weight**2).sum(0) + (b * (2 * (a.T @ weight) + (a.T @ a) @ b)).sum(0)
        return leaves["magnitude"] / jnp.sqrt(square)


def dora(
    model: Model,
    *,
    rank: int | Pattern = 8,
    alpha: float | Pattern | None = None,
    where: str = ".*/(query|value)",
    key: Array,
    stabilised: bool = False,
    dropout: float = 0.0,
    name: str = "dora",
    batch: Batch | None = None,
) -> Model:
    """``model`` with DoRA at the layers that ``where`` meets; arguments as those of ``jtl.adapters.lora``."""
    method = DoRA(*rules(rank, alpha), stabilised, dropout)
    return insert(model, method, where=where, key=key, name=name, batch=batch)
