"""VeRA: one frozen random pair A, B shared by all layers, and two trained vectors in each layer.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", https://arxiv.org/abs/2310.11454, equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.adapters.insert import insert
from jtl.adapters.method import Leaves, LowRank, Matrix
from jtl.adapters.site import QUERIES_AND_VALUES, Site
from jtl.errors import InputError
from jtl.model import Inputs, Model


@dataclass(frozen=True)
class VeRA(LowRank):
    """The method behind ``vera``: A diag(d) B diag(b), with A and B cut to each layer's size."""

    rank: int = 256
    initial: float = 0.1
    dropout: float = 0.0

    def shared(self, sites: tuple[Site, ...], key: Array) -> Leaves:
        """Draws A (largest m, r) and B (r, largest n) uniformly in ±sqrt(6 / fan-in) (He et al. 2015), as PEFT does.

        The fan-in is the largest m for A, and r for B.
        """
        m, n = max(site.rows for site in sites), max(site.columns for site in sites)
        first, second = jax.random.split(key)
        uniform = lambda key, shape, fan: jax.random.uniform(key, shape, minval=-1) * (6 / fan) ** 0.5  # noqa: E731
        return {
            "shared_a": uniform(first, (m, self.rank), m),
            "shared_b": uniform(second, (self.rank, n), self.rank),
        }

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """d at its initial value, b at 0."""
        return {
            "d": jnp.full(self.rank, self.initial, weight.dtype),
            "b": jnp.zeros(site.columns, weight.dtype),
        }

    def factors(self, site: Site, leaves: Leaves) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
        """Returns A diag(d) and B diag(b)."""
        a, b = leaves["shared_a"][: site.rows], leaves["shared_b"][:, : site.columns]
        return a * leaves["d"][None], b * leaves["b"][None]


def vera(
    model: Model,
    *,
    rank: int = 256,
    initial: float = 0.1,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    dropout: float = 0.0,
    name: str = "vera",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with VeRA at the layers that ``where`` matches.

    The shared pair is the collection ``variables[name]``, which no label can train.

    Args:
        model: a Linen model.
        rank: r of the pair; far above LoRA's, because it costs few parameters.
        initial: the start value of d.
        where: see ``jtl.adapters.lora``.
        key: for the pair.
        dropout: rate on the input of A, while training.
        name: of the adapter, its leaves and its collection.
        batch: see ``jtl.adapters.insert``.

    Raises:
        ValueError: ``rank`` is below 1; or as ``jtl.adapters.insert`` does.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    return insert(model, VeRA(rank, initial, dropout), where=where, key=key, name=name, batch=batch)
