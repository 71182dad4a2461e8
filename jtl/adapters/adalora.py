"""AdaLoRA: W + P Λ Q, whose singular values are pruned by importance until a rank budget is met.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
https://arxiv.org/abs/2303.10512, equations 3 and 4. ``jtl.adapters.allocate`` does the pruning, in the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl import tree
from jtl.adapters.insert import Adapter, insert, place
from jtl.adapters.lora import check_rank
from jtl.adapters.method import Leaves, LowRank, Matrix
from jtl.adapters.site import QUERIES_AND_VALUES, Site
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Batch, Inputs, Model, Outputs


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """The method behind ``adalora``."""

    rank: int = 12
    alpha: float = 12.0
    dropout: float = 0.0

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """P and Q normal with deviation 0.02, as in the authors' code; Λ = 0."""
        rank = check_rank(site, self.rank)
        first, second = jax.random.split(key)
        return {
            "p": 0.02 * jax.random.normal(first, (site.rows, rank), weight.dtype),
            "lambda": jnp.zeros(rank, weight.dtype),
            "q": 0.02 * jax.random.normal(second, (rank, site.columns), weight.dtype),
        }

    def factors(self, site: Site, leaves: Leaves) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
        """Returns P Λ times the scale, and Q; pruning does not change the scale."""
        return leaves["p"] * (leaves["lambda"] * (self.alpha / self.rank))[None], leaves["q"]


def adalora(
    model: Model,
    *,
    rank: int = 12,
    alpha: float | None = None,
    where: str = QUERIES_AND_VALUES,
    key: Array,
    dropout: float = 0.0,
    name: str = "adalora",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with AdaLoRA at the layers that ``where`` matches: ``p`` (m, r), ``lambda`` (r,), ``q`` (r, n).

    The method has three parts: the adapter, a penalty in the loss and pruning in the optimiser::

        model = adapters.adalora(model, rank=12, key=key)
        loss = tasks.Classify() + 0.1 * adapters.Orthogonality()
        optimizer = adapters.allocate(optax.adamw(1e-3), rank=8, steps=1000, start=100, final=300)
        step = make_step(loss, optimizer, finetune.train_only(model, ".*/adalora/.*|head/.*"))

    Args:
        model: a Linen model.
        rank: r, of every layer before pruning; the paper takes 1.5 times the final mean rank.
        alpha: the numerator of the scale alpha / r; by default r, which is the paper's scale 1.
        where: see ``jtl.adapters.lora``.
        key: for P and Q.
        dropout: rate on the input of P, while training.
        name: of the adapter and its leaves.
        batch: see ``jtl.adapters.insert``.
    """
    method = AdaLoRA(rank, float(rank if alpha is None else alpha), dropout)
    return insert(model, method, where=where, key=key, name=name, batch=batch)


class Orthogonality(Loss):
    """The AdaLoRA penalty R(P, Q) = |P^T P - I|^2 + |Q Q^T - I|^2 (Frobenius norms), summed over all layers.

    Zhang et al. 2023, equation 4.

    Attributes:
        form: ``"paper"``, or ``"peft"`` as in the authors' code and PEFT: norms that are not squared, averaged over
            the matrices P and Q. A weight (the paper's gamma, 0.1 to 0.5) for one form does not suit the other.
    """

    form: Literal["paper", "peft"] = struct.field(pytree_node=False, default="paper")

    def mode(self) -> None:
        """Returns None: the penalty reads only the parameters."""
        return None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the penalty.

        Raises:
            ValueError: the model has no AdaLoRA.
        """
        adapters = [t for t in model.techniques if isinstance(t, Adapter) and isinstance(t.method, AdaLoRA)]
        if not adapters:
            raise InputError("Orthogonality: the model has no AdaLoRA; insert it with jtl.adapters.adalora")
        params = tree.flatten(model.params)
        each = jnp.concatenate(
            [
                squares
                for adapter in adapters
                for site in adapter.sites
                for squares in (
                    _gaps(params[place(site, adapter.name, "p")]),
                    _gaps(params[place(site, adapter.name, "q")].mT),
                )
            ]
        )
        if self.form == "paper":
            return each.sum(), {}
        # The square root has no gradient at 0, where all is orthogonal already.
        return jnp.where(each > 0, jnp.sqrt(jnp.where(each > 0, each, 1.0)), 0.0).mean(), {}


def _gaps(matrices: Float[Array, "*stack m r"]) -> Float[Array, " k"]:
    """|M^T M - I|^2 of each matrix M, in float32."""
    matrices = matrices.astype(jnp.float32)
    gram = matrices.mT @ matrices
    return jnp.square(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)).sum((-2, -1)).ravel()
