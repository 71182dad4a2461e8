"""CDAN: adversarial adaptation whose discriminator sees features together with the classifier's predictions.

Long et al. 2018, "Conditional Adversarial Domain Adaptation", https://arxiv.org/abs/1705.10667.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.dann import adversary, dann, domain_logits, told, width_of
from jtl.domain.loss import DomainLoss, layer, source_and_target
from jtl.errors import MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables
from jtl.rows import entropy


def conditioned(features: Float[Array, "B D"], logits: Float[Array, "B C"]) -> Float[Array, "B D*C"]:
    """The outer product of features and softmax predictions, flattened; the predictions get no gradient."""
    p = jax.lax.stop_gradient(jax.nn.softmax(logits))
    return (features[:, :, None] * p[:, None, :]).reshape(len(features), -1)


def projected(
    features: Float[Array, "B D"],
    logits: Float[Array, "B C"],
    feature_map: Float[Array, "D P"],
    class_map: Float[Array, "C P"],
) -> Float[Array, "B P"]:
    """The randomised map ``(f R_f) ⊙ (p R_p) / √P``, whose inner products estimate those of ``conditioned``."""
    p = jax.lax.stop_gradient(jax.nn.softmax(logits))
    return (features @ feature_map) * (p @ class_map) / class_map.shape[1] ** 0.5


def entropy_weight(logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """``1 + exp(-H(p))``, from 1 + 1/C for a uniform prediction to 2 for a certain one; it gets no gradient."""
    return jax.lax.stop_gradient(1.0 + jnp.exp(-entropy(logits)))


@dataclass(frozen=True)
class Conditioned:
    """A technique: ``outputs["joint"]``, from ``on`` and ``logits``; projected if ``variables[name]`` has maps."""

    name: str
    on: str

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the joint output added."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            outputs, state = forward(variables, batch, mode, key)
            if self.on not in outputs or "logits" not in outputs:
                raise MissingError(
                    f"CDAN reads outputs {self.on!r} and 'logits'; the model gives {sorted(outputs)}"
                )
            features, logits = outputs[self.on], outputs["logits"]
            if maps := variables.get(self.name):
                joint = projected(features, logits, maps["features"], maps["classes"])
            else:
                joint = conditioned(features, logits)
            return {**outputs, "joint": joint}, state

        return run


def conditional_adversary(
    model: Model,
    *,
    classes: int,
    horizon: int | None,
    key: Array,
    on: str = "features",
    width: int | None = None,
    peak: float = 1.0,
    hidden: tuple[int, ...] = (1024, 1024),
    projection: int | None = None,
) -> Model:
    """Returns ``model`` with CDAN's adversary, which adds the output ``domain_logits``.

    Args:
        model: returns ``on`` (B, D) and ``logits`` (B, C): attach the classifier first.
        classes: C.
        horizon: the updates of this run: see ``adversary``.
        key: for the new leaves and the random maps.
        on: the features.
        width: D.
        peak: the largest λ.
        hidden: widths of the discriminator.
        projection: size P of the randomised map; the paper uses it where D·C is above 4096. The Gaussian maps lie in
            the collection ``multilinear`` and never train.

    Raises:
        ValueError: as ``adversary`` does.
    """
    width = width_of(model, on, width)
    below, above = jax.random.split(key)
    if projection is not None:
        keys = jax.random.split(below)
        maps = {
            "features": jax.random.normal(keys[0], (width, projection)),
            "classes": jax.random.normal(keys[1], (classes, projection)),
        }
        model = model.replace(variables={**model.variables, "multilinear": maps})
    model = model.with_technique(Conditioned("multilinear", on), {})
    size = width * classes if projection is None else projection
    return adversary(model, horizon=horizon, key=above, on="joint", width=size, peak=peak, hidden=hidden)


class CDAN(DomainLoss):
    """DANN's loss over a ``conditional_adversary``; with ``entropy``, CDAN+E: rows weighted by ``entropy_weight``.

    The weights are normalised over the rows of each domain in the batch. They get no gradient, like the predictions
    that condition; the authors' code lets a reversed gradient through them. Metrics are those of ``DANN``.

    Attributes:
        entropy: whether confident predictions count more.
    """

    entropy: bool = struct.field(pytree_node=False, default=False)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the model has no adversary, or the batch no ``domain``.
        """
        z, _, source, target = source_and_target(batch, domain_logits(outputs))
        sure = entropy_weight(layer(outputs, "logits")) if self.entropy else jnp.ones(len(z))
        return dann(z, z, source * sure, target * sure), told(outputs, z, source, target)
