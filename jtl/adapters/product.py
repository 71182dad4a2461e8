"""LoHa and LoKr: adapters that combine small factors by entrywise or Kronecker products instead of a low-rank sum.

LoHa: W + s (A1·B1) * (A2·B2), an entrywise product of rank up to r^2. Hyeon-Woo et al. 2022, "FedPara: Low-Rank
Hadamard Product for Communication-Efficient Federated Learning", https://arxiv.org/abs/2108.06098, proposition 2.

LoKr: W + s C (x) (A·B), a Kronecker product. Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker
Adapter", https://arxiv.org/abs/2212.10650; the second factor is low-rank as in LyCORIS (Yeh et al. 2023,
https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl.adapters.insert import insert
from jtl.adapters.lora import check_rank, rules
from jtl.adapters.method import Leaves, Matrix, Method, Pattern, at
from jtl.adapters.site import QUERIES_AND_VALUES, Site, SiteError
from jtl.model import Inputs, Model


@dataclass(frozen=True)
class LoHa(Method):
    """The method behind ``loha``."""

    rank: int | Pattern = 8
    alpha: float | Pattern = 16.0

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """All factors normal with LyCORIS's deviations (A1 0.1, B1 and B2 1), except A2 = 0."""
        rank = check_rank(site, at(self.rank, site.path, "rank"))
        first, second, third = jax.random.split(key, 3)
        normal = lambda k, *shape: jax.random.normal(k, shape, weight.dtype)  # noqa: E731
        return {
            "a1": 0.1 * normal(first, site.rows, rank),
            "b1": normal(second, rank, site.columns),
            "a2": jnp.zeros((site.rows, rank), weight.dtype),
            "b2": normal(third, rank, site.columns),
        }

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """Returns W + s (A1·B1) * (A2·B2)."""
        scale = at(self.alpha, site.path, "alpha") / leaves["a1"].shape[-1]
        return weight + scale * (leaves["a1"] @ leaves["b1"]) * (leaves["a2"] @ leaves["b2"])


@dataclass(frozen=True)
class LoKr(Method):
    """The method behind ``lokr``."""

    rank: int | Pattern = 8
    alpha: float | Pattern = 16.0

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """C and A uniform in ±1/sqrt(their rows), B = 0."""
        (m1, m2), (n1, n2) = split(site.rows), split(site.columns)
        if (rank := min(at(self.rank, site.path, "rank"), m2, n2)) < 1:
            raise SiteError(f"rank {rank} at {site.path}: it must be at least 1")
        first, second = jax.random.split(key)
        uniform = lambda k, m, n: jax.random.uniform(k, (m, n), weight.dtype, -(m**-0.5), m**-0.5)  # noqa: E731
        zeros = jnp.zeros((rank, n2), weight.dtype)
        return {"c": uniform(first, m1, n1), "a": uniform(second, m2, rank), "b": zeros}

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """Returns W + s C (x) (A·B)."""
        scale = at(self.alpha, site.path, "alpha") / leaves["a"].shape[-1]
        return weight + scale * jnp.kron(leaves["c"], leaves["a"] @ leaves["b"])


def split(size: int) -> tuple[int, int]:
    """Returns the two factors of ``size`` that are closest to each other, the smaller first.

    >>> split(384), split(7)
    ((16, 24), (1, 7))
    """
    small = next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)
    return small, size // small


def loha(
    model: Model,
    *,
    rank: int | Pattern = 8,
    alpha: float | Pattern | None = None,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    name: str = "loha",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with LoHa at the layers that ``where`` matches; arguments as in ``jtl.adapters.lora``."""
    return insert(model, LoHa(*rules(rank, alpha)), where=where, key=key, name=name, batch=batch)


def lokr(
    model: Model,
    *,
    rank: int | Pattern = 8,
    alpha: float | Pattern | None = None,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    name: str = "lokr",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with LoKr at the layers that ``where`` matches; arguments as in ``jtl.adapters.lora``.

    A rank above the highest that the second factor can have is lowered to it.

    Raises:
        SiteError: a rank is below 1; or as ``jtl.adapters.insert`` does.
    """
    return insert(model, LoKr(*rules(rank, alpha)), where=where, key=key, name=name, batch=batch)
