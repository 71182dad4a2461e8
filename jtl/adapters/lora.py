"""LoRA: W + (alpha / r) A·B, two thin trained matrices beside a frozen weight.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685, equation 3.
rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
https://arxiv.org/abs/2312.03732). PiSSA starts from the principal singular vectors of W (Meng et al. 2024, "PiSSA:
Principal Singular Values and Singular Vectors Adaptation of Large Language Models", https://arxiv.org/abs/2404.02948)
and OLoRA from its QR decomposition (Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language
Models", https://arxiv.org/abs/2406.01775); both subtract their start from W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.adapters.insert import insert
from jtl.adapters.method import Leaves, LowRank, Matrix, Pattern, at
from jtl.adapters.site import QUERIES_AND_VALUES, Site, SiteError
from jtl.model import Inputs, Model

Start = Literal["kaiming", "pissa", "olora"]


@dataclass(frozen=True)
class LoRA(LowRank):
    """The method behind ``lora``."""

    rank: int | Pattern = 8
    alpha: float | Pattern = 16.0
    stabilised: bool = False
    dropout: float = 0.0
    start: Start = "kaiming"

    @property
    def subtracted(self) -> bool:
        """Whether insertion subtracts the initial A·B from W."""
        return self.start != "kaiming"

    def scale(self, site: Site, rank: int) -> float:
        """Returns the factor of A·B."""
        return at(self.alpha, site.path, "alpha") / (rank**0.5 if self.stabilised else rank)

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """A uniform in ±1/sqrt(m) and B = 0 (for an embedding A = 0 and B normal); or the start of PiSSA or OLoRA."""
        rank = check_rank(site, at(self.rank, site.path, "rank"))
        if self.start == "kaiming":
            return kaiming(site, rank, key, weight.dtype)
        exact = weight.astype(jnp.float32)
        if self.start == "pissa":
            u, s, v = jnp.linalg.svd(exact, full_matrices=False)
            root = jnp.sqrt(s[:rank] / self.scale(site, rank))
            a, b = u[:, :rank] * root[None], root[:, None] * v[:rank]
        else:  # OLoRA decomposes the transpose, which is how torch stores W
            q, r = jnp.linalg.qr(exact.T)
            a, b = r[:rank].T, q[:, :rank].T
        return {"a": a.astype(weight.dtype), "b": b.astype(weight.dtype)}

    def factors(self, site: Site, leaves: Leaves) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
        """Returns A, and B times the scale."""
        return leaves["a"], leaves["b"] * self.scale(site, leaves["a"].shape[-1])


def kaiming(site: Site, rank: int, key: Array, dtype: Any) -> Leaves:
    """The usual start, with A·B = 0: A uniform in ±1/sqrt(m) and B = 0; for an embedding A = 0 and B normal."""
    if site.kind == "embed":
        return {
            "a": jnp.zeros((site.rows, rank), dtype),
            "b": jax.random.normal(key, (rank, site.columns), dtype),
        }
    bound = site.rows**-0.5
    a = jax.random.uniform(key, (site.rows, rank), dtype, -bound, bound)
    return {"a": a, "b": jnp.zeros((rank, site.columns), dtype)}


def check_rank(site: Site, rank: int) -> int:
    """Returns ``rank`` if W can have it.

    Raises:
        SiteError: it cannot.
    """
    if not 1 <= rank <= min(site.rows, site.columns):
        raise SiteError(
            f"rank {rank} at {site.path}: its weight is {site.rows} x {site.columns}, so a rank lies between 1 and "
            f"{min(site.rows, site.columns)}"
        )
    return rank


def lora(
    model: Model,
    *,
    rank: int | Pattern = 8,
    alpha: float | Pattern | None = None,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    stabilised: bool = False,
    dropout: float = 0.0,
    start: Start = "kaiming",
    name: str = "lora",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with LoRA at the layers that ``where`` matches; errors are those of ``jtl.adapters.insert``.

    Args:
        model: a Linen model.
        rank: r, or rules ``((regex of module paths, r), ...)``.
        alpha: the numerator of the scale, or rules likewise; by default 2 r.
        where: regular expression of module paths of Dense, DenseGeneral, Conv or Embed layers; by default queries and
            values.
        key: for A.
        stabilised: rsLoRA: scale by alpha / sqrt(r).
        dropout: rate on the input of A, while training.
        start: ``kaiming``, ``pissa`` or ``olora``.
        name: of the adapter and its leaves.
        batch: see ``jtl.adapters.insert``.
    """
    method = LoRA(*rules(rank, alpha), stabilised, dropout, start)
    return insert(model, method, where=where, key=key, name=name, batch=batch)


def rules(rank: int | Pattern, alpha: float | Pattern | None) -> tuple[int | Pattern, float | Pattern]:
    """Returns rank and alpha as a method stores them: rules as tuples, alpha 2 r by default."""
    if not isinstance(rank, int):
        rank = tuple((pattern, int(own)) for pattern, own in rank)
    if alpha is None:
        return rank, 2.0 * rank if isinstance(rank, int) else tuple((pattern, 2.0 * r) for pattern, r in rank)
    if isinstance(alpha, (int, float)):
        return rank, float(alpha)
    return rank, tuple((pattern, float(own)) for pattern, own in alpha)
