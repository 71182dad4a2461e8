"""Classification: cross-entropy of ``outputs["logits"]`` against ``batch["label"]``, and metrics."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs


class Classify(Loss):
    """Mean softmax cross-entropy over the rows of a batch, in nats.

    Rows of ``batch["weight"]`` 0 (padding of a last batch) do not count. A label outside the classes makes the loss
    NaN, at which ``jtl.train.fit`` stops.

    Attributes:
        smoothing: label smoothing, the share of the target spread evenly over the classes (Szegedy et al. 2016,
            "Rethinking the Inception Architecture for Computer Vision", https://arxiv.org/abs/1512.00567, section 7).
        stats: normalise by ``"running"`` or ``"batch"`` statistics.
    """

    smoothing: float = struct.field(pytree_node=False, default=0.0)
    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def mode(self) -> Mode:
        """Dropout on, normalisation as set by ``stats``."""
        return Mode(train=True, stats=self.stats)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and the batch's ``accuracy`` as a metric."""
        logits, label = outputs["logits"], jnp.asarray(batch["label"])
        weight = rows.weights(batch, len(label))
        losses = rows.cross_entropy(logits, label, self.smoothing)
        return rows.mean(losses, weight), {"accuracy": rows.mean(jnp.argmax(logits, -1) == label, weight)}


def accuracy(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """Returns the share of rows whose largest logit is at the label, in [0, 1]."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def confusion(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, "C C"]:
    """Returns the confusion matrix: how often true class i (row) was predicted as j (column)."""
    table = np.zeros((logits.shape[-1],) * 2, int)
    np.add.at(table, (labels, np.argmax(logits, -1)), 1)
    return table


def macro_f1(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> float:
    """Returns the mean over classes of 2·TP / (2·TP + FP + FN); a class neither true nor predicted counts as 0."""
    table = confusion(logits, labels)
    hits = np.diag(table)
    return float(np.mean(2 * hits / np.maximum(table.sum(0) + table.sum(1), 1)))


def expected_calibration_error(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], bins: int = 15
) -> float:
    """Returns the mean gap between confidence and accuracy over equal-width bins, weighted by their number of rows.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3.
    """
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    confidence = (shifted / shifted.sum(-1, keepdims=True)).max(-1)
    hits = np.argmax(logits, -1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(hits[bin_of == b].mean() - confidence[bin_of == b].mean()) * (bin_of == b).mean()
        for b in set(bin_of)
    ]
    return float(sum(gaps))
