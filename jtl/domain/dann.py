"""DANN: a discriminator of domains behind a gradient reversal.

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
        outputs: size of the output: 1 for the logit of *target*, C for an adversary that names classes.
    """

    hidden: tuple[int, ...] = (1024, 1024)
    outputs: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool = False) -> Float[Array, "B O"]:
        """Logits."""
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
    """``model`` with a discriminator behind a gradient reversal: ``outputs[output]`` (B, outputs).

    Its leaves lie in ``params[name]`` and train as any head's; its count of steps in ``variables[name]``. λ is
    ``peak · (2 / (1 + exp(-10 p)) - 1)`` with p = step / horizon.

    Args:
        model: any model that gives ``on``.
        horizon: the updates of this run; None holds λ at ``peak``.
        key: for the new leaves.
        on: the output that is to become the same in both domains, (B, D).
        width: D; by default that of the model's architecture.
        peak: the largest λ.
        hidden: widths of the hidden layers.
        outputs: see ``Discriminator``.
        name: of the head and its collection.
        output: the name of its logits.

    Raises ValueError if the model has leaves of that name, a horizon below 1, or an unknown width.
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
    """``width``, or that of output ``on`` in the model's architecture; ValueError if neither is known."""
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

    Each domain has a mean of its own, as in the paper's objective, so a batch of unequal shares weighs them alike.
    2 ln 2 is a discriminator that tells nothing. (Averaging over all rows together, as many implementations do, gives
    half of it for equal shares.)

    >>> round(float(dann(jnp.zeros(3), jnp.zeros(2))), 4)
    1.3863
    """
    z, u, a, b = pair(source_logits, target_logits, source_weight, target_weight)
    return mean(jax.nn.softplus(z), a) + mean(jax.nn.softplus(-u), b)


class DANN(DomainLoss):
    """``dann`` on ``outputs["domain_logits"]``, from a model with an ``adversary``. Metrics: its accuracy, and λ."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError without an adversary or without ``batch["domain"]``."""
        z, _, source, target = source_and_target(batch, domain_logits(outputs))
        return dann(z, z, source, target), told(outputs, z, source, target)


def domain_logits(outputs: Outputs) -> Float[Array, " B"]:
    """The logit of *target* of each row; KeyError if the model has no adversary."""
    if "domain_logits" not in outputs:
        raise MissingError("the model gives no 'domain_logits': put jtl.domain.adversary on it")
    return layer(outputs, "domain_logits")[:, 0]


def told(outputs: Outputs, z: Array, source: Array, target: Array) -> dict[str, Array]:
    """Metrics: the discriminator's accuracy over both domains, and λ if there is a reversal."""
    hits = mean(jnp.where(source > 0, z <= 0, z > 0).astype(jnp.float32), source + target)
    return {"domain_accuracy": hits} | ({"reversal": outputs["reversal"]} if "reversal" in outputs else {})
