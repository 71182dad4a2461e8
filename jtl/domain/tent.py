"""Tent: adapts a model at test time by training only normalisation scales and shifts for confident predictions.

Wang et al. 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization", https://arxiv.org/abs/2006.10726.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.domain.loss import layer
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Batch, Inputs, Mode, Model, Outputs, modules
from jtl.rows import entropy, mean, weights

NORMALISATIONS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)


def norm_only(model: Model, batch: Inputs) -> PyTree:
    """Labels that train the scales and shifts of normalisation layers at the full rate and freeze the rest.

    Args:
        model: a Linen model.
        batch: any batch; the model is traced on it to find its layers.

    Raises:
        ValueError: there is no normalisation layer with parameters.
    """
    found = {path for path, kind in modules(model, batch).items() if issubclass(kind, NORMALISATIONS)}
    labels = tree.map_with_path(lambda path, _: float(path.rpartition("/")[0] in found), model.params)
    if not any(jax.tree.leaves(labels)):
        raise InputError("the model has no normalisation layer with parameters: Tent has nothing to train")
    return labels


class Tent(Loss):
    """The mean entropy of the predictions, over all rows, with batch statistics and without dropout."""

    def mode(self) -> Mode:
        """Returns the mode without dropout and with batch statistics."""
        return Mode(stats="batch")

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the entropy, in nats."""
        logits = layer(outputs, "logits")
        return mean(entropy(logits), weights(batch, len(logits))), {}


def adapt(
    step: Any,
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    key: Array,
    episodic: bool = False,
    updates: int = 1,
) -> Float[np.ndarray, "N C"]:
    """Returns the logits of each row of ``batches``, in order, from a model that adapts as it goes.

    Online, each batch is predicted first and then updates the model for later batches. Episodic, each batch starts
    from ``model`` again and is predicted after its own updates.

    Args:
        step: ``jtl.train.make_step(Tent(), optimizer, norm_only(model, batch))``, or one with another loss.
        model: the source model.
        batches: mappings of arrays; the logits of rows of ``weight`` 0 are dropped.
        key: of the run.
        episodic: whether to restart from ``model`` at every batch.
        updates: updates per batch.

    Raises:
        ValueError: there are no batches.
    """
    state = step.init(model, key)
    rows = []
    for batch in batches:
        if episodic:
            state = step.init(model, key)
        logits = None if episodic else _logits(state.model, batch)
        for _ in range(updates):
            state, _ = step(state, batch)
        logits = _logits(state.model, batch) if logits is None else logits
        kept = np.asarray(batch["weight"]) > 0 if "weight" in batch else slice(None)
        rows.append(np.asarray(logits)[kept])
    if not rows:
        raise InputError("no batches: nothing to adapt to")
    return np.concatenate(rows)


@jax.jit
def _logits(model: Model, batch: Batch) -> Array:
    return model(batch, stats="batch")["logits"]
