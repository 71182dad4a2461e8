"""GroupDRO: training for the worst of several labelled domains.

Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization for
Worst-Case Generalization", https://arxiv.org/abs/1911.08731, algorithm 1: domain weights q follow exponentiated
gradient ascent, parameters descend ``Σ q_g · risk_g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, risks
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


def reweighted(
    q: Float[Array, " K"], risk: Float[Array, " K"], present: Float[Array, " K"], step_size: float
) -> Float[Array, " K"]:
    """Returns ``q_g exp(η · risk_g)`` over its sum; a domain without rows in the batch counts as risk 0."""
    logits = jnp.log(q) + step_size * jnp.where(present > 0, risk, 0.0)
    return jax.lax.stop_gradient(jax.nn.softmax(logits))


@dataclass(frozen=True)
class GroupWeights:
    """A technique: ``variables["group_weights"]`` holds q, which each training forward updates by the batch's risks.

    Attributes:
        domains: K.
        step_size: η.
    """

    domains: int
    step_size: float

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with ``outputs["group_weights"]``."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            outputs, state = forward(variables, batch, mode, key)
            if not mode.train:
                return outputs, state
            risk, present = risks(outputs, batch, self.domains)
            q = reweighted(variables["group_weights"]["q"], risk, present, self.step_size)
            return {**outputs, "group_weights": q}, {**state, "group_weights": {"q": q}}

        return run


def group_weights(model: Model, *, domains: int, step_size: float = 0.01) -> Model:
    """Returns ``model`` with GroupDRO's domain weights, uniform at first; attach it after the head.

    Args:
        model: returns ``logits``.
        domains: K; a batch's ``domain`` is 0 ... K - 1.
        step_size: η.

    Raises:
        ValueError: fewer than two domains.
    """
    if domains < 2:
        raise InputError(f"GroupDRO needs two domains or more, got {domains}")
    q = jnp.full((domains,), 1 / domains)
    model = model.replace(variables={**model.variables, "group_weights": {"q": q}})
    return model.with_technique(GroupWeights(domains, step_size), {})


class GroupDRO(DomainLoss):
    """The GroupDRO loss ``Σ_g q_g · risk_g`` with the weights just updated; it replaces the supervised term.

    The metric ``worst_risk`` is the risk of the worst domain.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: ``group_weights``, ``batch["domain"]`` or ``batch["label"]`` is missing.
        """
        if "group_weights" not in outputs:
            raise MissingError("GroupDRO needs jtl.domain.group_weights(model, domains=K)")
        q = outputs["group_weights"]
        risk, _ = risks(outputs, batch, len(q))
        return jnp.sum(q * risk), {"worst_risk": jnp.max(risk)}
