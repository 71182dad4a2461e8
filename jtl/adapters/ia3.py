"""IA3: one trained factor for each output of a layer, or for each of its inputs.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
https://arxiv.org/abs/2205.05638, section 3.3: it scales keys, values and the hidden activations of the feed-forward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.adapters.insert import insert
from jtl.adapters.method import Leaves, Matrix, Scaling
from jtl.adapters.site import Site
from jtl.model import Inputs, Model


@dataclass(frozen=True)
class IA3(Scaling):
    """The method behind ``ia3``."""

    feedforward: str = ".*/mlp/output"

    def on_inputs(self, site: Site) -> bool:
        """Whether the inputs of ``site`` are scaled, rather than its outputs."""
        return re.fullmatch(self.feedforward, site.path) is not None

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """All factors are 1."""
        return {"scale": jnp.ones(site.rows if self.on_inputs(site) else site.columns, weight.dtype)}

    def rows(self, site: Site, leaves: Leaves) -> Float[Array, " m"] | None:
        """Returns the factors, where the inputs are scaled."""
        return leaves["scale"] if self.on_inputs(site) else None

    def columns(self, site: Site, weight: Matrix, leaves: Leaves) -> Float[Array, " n"] | None:
        """Returns the factors, where the outputs are scaled."""
        return None if self.on_inputs(site) else leaves["scale"]

    def bias(self, site: Site, bias: Float[Array, " n"], leaves: Leaves) -> Float[Array, " n"]:
        """Returns the bias, scaled with the outputs."""
        return bias if self.on_inputs(site) else bias * leaves["scale"]


def ia3(
    model: Model,
    *,
    where: str = ".*/(key|value|query_key_value|mlp/output)",
    feedforward: str = ".*/mlp/output",
    key: Array,
    name: str = "ia3",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with IA3 at the layers that ``where`` matches.

    Args:
        model: a Linen model.
        where: see ``jtl.adapters.lora``.
        feedforward: regular expression of the layers whose inputs are scaled: the second layer of each feed-forward.
            Of all other layers the outputs are scaled.
        key: unused, because all factors start at 1; every adapter takes it.
        name: of the adapter and its leaves.
        batch: see ``jtl.adapters.insert``.
    """
    return insert(model, IA3(feedforward), where=where, key=key, name=name, batch=batch)
