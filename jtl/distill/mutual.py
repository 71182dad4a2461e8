"""Deep mutual learning: several models train together, each also on the predictions of the others.

Zhang, Xiang, Hospedales and Lu 2018, "Deep Mutual Learning", CVPR 2018, https://arxiv.org/abs/1706.00384.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.distill.soft_targets import soft_targets
from jtl.distill.term import row_weight
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Technique, Variables
from jtl.tasks.classify import Classify


@dataclass(frozen=True)
class Peers:
    """A forward of several models on one batch: their outputs, variables and state as ``peer_0``, ``peer_1``, ..."""

    statics: tuple[tuple[Forward, tuple[Technique, ...], Any], ...]

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Runs each model with its own key."""
        outputs: Outputs = {}
        state: State = {}
        for i, (base, techniques, config) in enumerate(self.statics):
            name = f"peer_{i}"
            own = Model(_of(variables, name), base, techniques, config)
            own_key = None if key is None else jax.random.fold_in(key, i)
            outputs[name], changed = own.run(batch, replace(mode, taps=()), own_key)
            for collection, leaves in changed.items():
                state.setdefault(collection, {})[name] = leaves
        return outputs, state


def _of(variables: Variables, name: str) -> dict[str, Any]:
    return {collection: leaves[name] for collection, leaves in variables.items() if name in leaves}


def peers(models: Sequence[Model]) -> Model:
    """Combines models into one, which ``Mutual`` trains; its leaves are ``peer_0/...``, ``peer_1/...``.

    Raises:
        ValueError: fewer than two models.
    """
    if len(models) < 2:
        raise InputError(f"mutual learning takes at least two models, got {len(models)}")
    variables: dict[str, Any] = {}
    for i, model in enumerate(models):
        for collection, leaves in model.variables.items():
            variables.setdefault(collection, {})[f"peer_{i}"] = leaves
    return Model(variables, Peers(tuple((model.base, model.techniques, model.config) for model in models)))


def peer(model: Model, number: int) -> Model:
    """Returns one of the ``peers`` as a model of its own.

    Raises:
        ValueError: there is no peer of that number.
    """
    if not isinstance(model.base, Peers) or not 0 <= number < len(model.base.statics):
        raise InputError(f"no peer {number}: the model is not of peers(...), or of fewer")
    base, techniques, config = model.base.statics[number]
    return Model(_of(model.variables, f"peer_{number}"), base, techniques, config)


class Mutual(Loss):
    """The sum over peers k of cross-entropy and ``Σ_l KL(p_l || p_k) / (K - 1)``, l the other peers, held fixed.

    The paper updates the peers in turn; here all are updated at once, from the same predictions.

    Attributes:
        stats: normalise by ``"running"`` or ``"batch"`` statistics.
    """

    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def mode(self) -> Mode:
        """Returns the mode with dropout on and the chosen normalisation."""
        return Mode(train=True, stats=self.stats)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and each peer's accuracy as ``accuracy_0``, ...

        Raises:
            ValueError: the model is not from ``peers``.
        """
        names = [name for name in outputs if name.startswith("peer_")]
        if len(names) < 2:
            raise InputError("Mutual trains a model of jtl.distill.peers((first, second, ...))")
        total, metrics = jnp.zeros(()), {}
        for i, name in enumerate(names):
            own = outputs[name]["logits"]
            task, found = Classify().value(model, outputs[name], batch, key)
            fixed = [jax.lax.stop_gradient(outputs[other]["logits"]) for other in names if other != name]
            taught = [soft_targets(own, other, 1.0, row_weight(batch)) for other in fixed]
            total += task + sum(taught) / len(taught)
            metrics[f"accuracy_{i}"] = found["accuracy"]
        return total, metrics
