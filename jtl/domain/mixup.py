"""Mixup: train on lines between examples.

Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", https://arxiv.org/abs/1710.09412.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.data.batches.mixup import mix
from jtl.domain.loss import DomainLoss, column, layer
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables
from jtl.rows import cross_entropy, mean, weights


@dataclass(frozen=True)
class MixedRows:
    """A technique: while training, ``batch[field]`` is ``λ x_i + (1 - λ) x_π(i)``; ``outputs["mixup"]`` has λ and π.

    λ ~ Beta(α, α), one a batch, and π a permutation of its rows, whatever their domains.

    Attributes:
        field: the model's input, of real numbers.
        alpha: α.
    """

    field: str
    alpha: float
    name: ClassVar[str] = "mixup"

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` of mixed rows."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if not mode.train:
                return forward(variables, batch, mode, key)
            x = column(batch, self.field, "the input to mix")
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise InputError(f"mixup needs real numbers; field {self.field!r} is {x.dtype}")
            if key is None:
                raise InputError("mixup draws at random: pass key=")
            share_key, order_key, below = jax.random.split(key, 3)
            share = jax.random.beta(share_key, self.alpha, self.alpha)
            partner = jax.random.permutation(order_key, len(x))
            with_mixup = mix(x, share, partner).astype(x.dtype)
            outputs, state = forward(variables, {**batch, self.field: with_mixup}, mode, below)
            return {**outputs, "mixup": {"share": share, "partner": partner}}, state

        return run


def with_mixup(model: Model, *, field: str = "image", alpha: float = 0.2) -> Model:
    """``model`` that trains on mixed rows. The paper takes α in 0.1 ... 0.4 on ImageNet and 1 on CIFAR."""
    if alpha <= 0:
        raise InputError(f"alpha must be over 0, got {alpha}")
    return model.with_technique(MixedRows(field, alpha), {})


class Mixup(DomainLoss):
    """``λ CE(y_i) + (1 - λ) CE(y_π(i))``, the mean over rows; it is the supervised term of a ``with_mixup`` model."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError unless the model is ``with_mixup`` and the batch has ``label``."""
        if "mixup" not in outputs:
            raise MissingError("Mixup needs jtl.domain.with_mixup(model, field=...)")
        share, partner = outputs["mixup"]["share"], outputs["mixup"]["partner"]
        logits, label = layer(outputs, "logits"), column(batch, "label", "the class of each row")
        losses = share * cross_entropy(logits, label) + (1 - share) * cross_entropy(logits, label[partner])
        return _mean(losses, weights(batch, len(label)), partner), {}


def _mean(losses: Array, weight: Array, partner: Array) -> Float[Array, ""]:
    """The mean over rows that count and whose partner does: a mixture with padding has a padding's label."""
    return mean(losses, weight * weight[partner])
