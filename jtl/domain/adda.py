"""ADDA: a target encoder trained adversarially to produce features like those of a fixed source encoder.

Tzeng et al. 2017, "Adversarial Discriminative Domain Adaptation", https://arxiv.org/abs/1702.05464. Two stages:

    source = ...                                            # 1: fine-tuned on source rows, as usual
    model = jtl.domain.discriminator(source, key=key)       # 2: the target encoder starts as the source's
    labels = jtl.finetune.freeze(model, "head/.*")          #    and keeps its classifier
    step = jtl.train.make_step(jtl.domain.ADDA(source), optimizer, labels)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import heads
from jtl.domain.dann import Discriminator, dann, width_of
from jtl.domain.loss import DomainLoss, domains, layer
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


def discriminator(
    model: Model,
    *,
    key: Array,
    on: str = "features",
    width: int | None = None,
    hidden: tuple[int, ...] = (1024, 1024),
) -> Model:
    """Returns ``model`` with a discriminator head on ``on``, with output ``domain_logits`` and no gradient reversal.

    Args:
        model: any model that returns ``on``.
        key: for the new leaves.
        on: the features.
        width: their size; by default that of the model's architecture.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: the width is unknown.
    """
    module = Discriminator(tuple(hidden))
    return heads.attach(
        model,
        module,
        on=on,
        width=width_of(model, on, width),
        key=key,
        name="discriminator",
        output="domain_logits",
    )


class ADDA(DomainLoss):
    """The discriminator's loss plus the target encoder's, which uses flipped domain labels.

    The discriminator separates ``source``'s features of source rows from the model's features of target rows. The
    model minimises ``mean_target -log(1 - d)``, as if target rows were source rows. Neither loss sends a gradient into
    the other's leaves. Both are updated at once from the same parameters; the paper alternates.

    Attributes:
        source: the model after stage 1; it never trains.
    """

    source: Model

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the sum, and the parts as metrics.

        Raises:
            ValueError: the model has no discriminator.
            KeyError: there is no ``batch["domain"]``.
        """
        head = heads.find(model, "discriminator")
        if head is None:
            raise InputError("ADDA needs a discriminator: jtl.domain.discriminator(model, key=key)")
        a, b = domains(batch)
        module = head.module
        params = model.params["discriminator"]

        def tell(params: Any, x: Array) -> Array:
            logits: Any = module.apply({"params": params}, x)
            return logits[:, 0]

        own = layer(outputs, head.on)
        fixed = jax.lax.stop_gradient(layer(self.source(batch), head.on))
        critic = dann(tell(params, fixed), tell(params, jax.lax.stop_gradient(own)), a, b)
        flipped = jax.nn.softplus(tell(jax.lax.stop_gradient(params), own))
        encoder = mean(flipped, b)
        return critic + encoder, {"discriminator_loss": critic, "encoder_loss": jnp.asarray(encoder)}
