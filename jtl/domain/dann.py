"""DANN: a domain discriminator behind a gradient reversal, so that features become the same in both domains.

Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", https://arxiv.org/abs/1505.07818.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import heads
from jtl.domain.loss import DomainLoss, layer, pair, source_and_target
from jtl.domain.reversal import Reversal
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


class Discriminator(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
        hidden: width of each hidden layer.
        outputs: size of the output: 1 for the logit of *target*, C for an adversary that predicts classes.
    """

    hidden: tuple[int, ...] = (1024, 1024)
    outputs: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool = False) -> Float[Array, "B O"]:
        """Returns logits."""
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return nn.Dense(self.outputs, name="out")(x)


def adversary(
    model: Model,
    *,
    horizon: int | None,
    key: Array,
    on: str = "features",
    width: int | None = None,
    peak: float = 1.0,
    hidden: tuple[int, ...] = (1024, 1024),
    outputs: int = 1,
    name: str = "discriminator",
    output: str = "domain_logits",
) -> Model:
    """Returns ``model`` with a discriminator behind a gradient reversal: ``outputs[output]`` (B, outputs).

    Its leaves lie in ``params[name]`` and train like those of any head; its step count is in ``variables[name]``. λ is
    ``peak · (2 / (1 + exp(-10 p)) - 1)`` with p = step / horizon.

    Args:
        model: any model that returns ``on``.
        horizon: the updates of this run; None holds λ at ``peak``.
        key: for the new leaves.
        on: the output that should become the same in both domains, (B, D).
        width: D; by default that of the model's architecture.
        peak: the largest λ.
        hidden: widths of the hidden layers.
        outputs: see ``Discriminator``.
        name: of the head and its collection.
        output: the name of its logits.

    Raises:
        ValueError: the model has leaves of that name, the horizon is below 1, or the width is unknown.
    """
    if name in model.variables or name in model.params:
        raise InputError(f"the model has {name!r} already: give this adversary another name")
    if horizon is not None and horizon < 1:
        raise InputError(f"horizon must be the number of updates of the run, at least 1; got {horizon}")
    reversed_name = f"{name}/{on}"
    counted = model.replace(variables={**model.variables, name: {"step": jnp.zeros((), jnp.int32)}})
    behind = counted.with_technique(Reversal(name, on, reversed_name, horizon, peak), {})
    return heads.attach(
        behind,
        Discriminator(tuple(hidden), outputs),
        on=reversed_name,
        width=width_of(model, on, width),
        key=key,
        name=name,
        output=output,
    )


def width_of(model: Model, on: str, width: int | None) -> int:
    """Returns ``width``, or by default that of output ``on`` in the model's architecture.

    Raises:
        ValueError: neither is known.
    """
    if width is not None:
        return width
    if not hasattr(model.config, "width"):
        raise InputError(f"this model's architecture is unknown: pass width=, the size of its {on!r}")
    return model.config.width(on)


def dann(
    source_logits: Float[Array, " N"],
    target_logits: Float[Array, " M"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """The discriminator's loss, ``mean_source -log(1 - d) + mean_target -log d`` with d = sigmoid(logit), in nats.

    Each domain has its own mean, as in the paper's objective, so domains with unequal numbers of rows weigh the same.
    A discriminator that cannot distinguish the domains has 2 ln 2. (Many implementations average over all rows
    together, which is half of this for equal numbers.)

    Args:
        source_logits: the logit of *target* of each source row.
        target_logits: that of each target row.
        source_weight: of each source row.
        target_weight: of each target row.

    >>> round(float(dann(jnp.zeros(3), jnp.zeros(2))), 4)
    1.3863
    """
    z, u, a, b = pair(source_logits, target_logits, source_weight, target_weight)
    return mean(jax.nn.softplus(z), a) + mean(jax.nn.softplus(-u), b)


class DANN(DomainLoss):
    """``dann`` on ``outputs["domain_logits"]``, from a model with an ``adversary``.

    Metrics: the discriminator's accuracy ``domain_accuracy``, and λ as ``reversal``.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the model has no adversary, or the batch no ``domain``.
        """
        z, _, source, target = source_and_target(batch, domain_logits(outputs))
        return dann(z, z, source, target), told(outputs, z, source, target)


def domain_logits(outputs: Outputs) -> Float[Array, " B"]:
    """Returns the logit of *target* of each row.

    Raises:
        KeyError: the model has no adversary.
    """
    if "domain_logits" not in outputs:
        raise MissingError("the model gives no 'domain_logits': put jtl.domain.adversary on it")
    return layer(outputs, "domain_logits")[:, 0]


def told(outputs: Outputs, z: Array, source: Array, target: Array) -> dict[str, Array]:
    """Returns the metrics: the discriminator's accuracy over both domains, and λ if there is a reversal."""
    hits = mean(jnp.where(source > 0, z <= 0, z > 0).astype(jnp.float32), source + target)
    return {"domain_accuracy": hits} | ({"reversal": outputs["reversal"]} if "reversal" in outputs else {})
