"""Semantic segmentation: losses of ``outputs["pixel_logits"]`` against ``batch["mask"]``, and metrics.

``jtl.models.feature_pyramid.segmenter`` builds the model. Pixels whose mask value is not a class, by convention 255,
are ignored everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs


class _Pixels(Loss):
    """Base of both losses; ``stats``: normalise by ``"running"`` or ``"batch"`` statistics."""

    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def mode(self) -> Mode:
        """Dropout on, normalisation as set by ``stats``."""
        return Mode(train=True, stats=self.stats)


def _known(outputs: Outputs, batch: Batch) -> tuple[Array, Array, Array]:
    """Logits (B, H, W, C), the mask (B, H, W) and the weight of each pixel (B, H, W)."""
    logits, mask = outputs["pixel_logits"], batch["mask"]
    if logits.shape[:3] != mask.shape:
        raise InputError(
            f"pixel_logits {logits.shape} and mask {mask.shape} differ in size: the sides of images must be multiples "
            "of the strides of the model's maps"
        )
    weight = ((mask >= 0) & (mask < logits.shape[-1])).astype(jnp.float32)
    weight = weight * rows.weights(batch, len(mask))[:, None, None]
    return logits.astype(jnp.float32), mask, weight


class Segment(_Pixels):
    """Mean softmax cross-entropy over the pixels of a batch, in nats. Rows of ``batch["weight"]`` 0 do not count."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and the batch's ``pixel_accuracy`` as a metric."""
        logits, mask, weight = _known(outputs, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(weight > 0, mask, 0))
        hits = jnp.argmax(logits, -1) == mask
        return rows.mean(losses, weight), {"pixel_accuracy": rows.mean(hits, weight)}


class Dice(_Pixels):
    """One minus the mean over classes of ``2 Σ p t / (Σ p² + Σ t²)``, with sums over all pixels of a batch.

    p is the probability of the class and t its indicator; only classes present in the batch count. Rare classes weigh
    as much as the background, which dominates a mean over pixels. Milletari, Navab, Ahmadi 2016, "V-Net",
    https://arxiv.org/abs/1606.04797, section 3, applied per class.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        logits, mask, weight = _known(outputs, batch)
        chance = jax.nn.softmax(logits) * weight[..., None]
        there = jax.nn.one_hot(mask, logits.shape[-1]) * weight[..., None]
        over = (0, 1, 2)
        shared, sizes = (chance * there).sum(over), (chance**2 + there**2).sum(over)
        counts = there.sum(over) > 0
        ratio = jnp.where(counts, 2 * shared / jnp.maximum(sizes, 1e-6), 0.0)
        return 1 - ratio.sum() / jnp.maximum(counts.sum(), 1), {}


def pixel_confusion(pairs: Iterable[tuple[np.ndarray, np.ndarray]], classes: int) -> Int[np.ndarray, "C C"]:
    """Returns how often pixels of class i (row) were predicted as j (column), over pairs of true and predicted masks.

    It uses scikit-learn on one mask at a time, to hold only one in memory. Pixels whose true value is not a class are
    ignored.
    """
    from sklearn.metrics import confusion_matrix

    total = np.zeros((classes, classes), np.int64)
    for true, predicted in pairs:
        real = (true >= 0) & (true < classes)
        if real.any():
            total += confusion_matrix(true[real], predicted[real], labels=np.arange(classes))
    return total


def segmentation_scores(confusion: Int[np.ndarray, "C C"]) -> dict[str, float]:
    """Returns ``mean_iou``, ``mean_dice`` and ``pixel_accuracy`` of a table of ``pixel_confusion``, all in [0, 1].

    For each class, the intersection over union is TP / (TP + FP + FN), as in PASCAL VOC (Everingham et al. 2010), and
    the Dice coefficient 2 TP / (2 TP + FP + FN), over all images together. Means are over classes that occur or were
    predicted, background included.
    """
    hits = np.diag(confusion).astype(float)
    named, there = confusion.sum(0), confusion.sum(1)
    some = named + there > 0
    iou, dice = hits[some] / (named + there - hits)[some], 2 * hits[some] / (named + there)[some]
    accuracy = hits.sum() / max(confusion.sum(), 1)
    return {"mean_iou": float(iou.mean()), "mean_dice": float(dice.mean()), "pixel_accuracy": float(accuracy)}
