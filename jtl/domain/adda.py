"""ADDA: a target encoder that learns to look like a fixed source encoder.

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
    """``model`` with a head ``discriminator`` on ``on``, giving ``domain_logits``, and no reversal."""
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
    """The discriminator's loss plus the target encoder's, which has the label flipped.

    The discriminator tells ``source``'s features of source rows from the model's of target rows; the model minimises
    ``mean_target -log(1 - d)``, as if target were source. Neither draws a gradient into the other's leaves. Both take
    one update at a time from the same parameters, where the paper takes them in turn.

    Attributes:
        source: the model after stage 1; it never trains.
    """

    source: Model

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum, and the parts as metrics.

        Raises ValueError without a discriminator, KeyError without ``batch["domain"]``.
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
