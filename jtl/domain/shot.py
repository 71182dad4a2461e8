"""SHOT: source-free adaptation by information maximisation and pseudo-labels, under a frozen classifier.

Liang et al. 2020, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
Adaptation", https://arxiv.org/abs/2002.08546. All rows of a batch are target rows; no ``domain`` is needed:

    labels = jtl.finetune.freeze(model, "head/.*")          # the classifier stays the source's
    found = jtl.outputs.outputs(model, batches, ("features", "logits"))
    batch["pseudo_label"] = centroid_labels(found["features"], found["logits"])[batch["index"]]   # again each epoch
    step = jtl.train.make_step(jtl.domain.SHOT(), optimizer, labels)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.domain.loss import DomainLoss, column, layer
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs
from jtl.rows import cross_entropy, entropy, mean, weights


def information_maximisation(
    logits: Float[Array, "M C"], weight: Float[Array, " M"] | None = None
) -> Float[Array, ""]:
    """Computes ``mean H(p_i) - H(mean p_i)``: low when each prediction is confident and all together are diverse.

    Args:
        logits: predictions; p_i is their softmax.
        weight: of each row; 0 leaves it out.
    """
    weight = jnp.ones(len(logits)) if weight is None else weight
    average = mean(jax.nn.softmax(logits.astype(jnp.float32)), weight)
    log_average = jnp.log(jnp.where(average > 0, average, 1.0))
    return mean(entropy(logits), weight) + jnp.sum(average * log_average)


def centroid_labels(
    features: Float[np.ndarray, "M D"], logits: Float[np.ndarray, "_ C"]
) -> Int[np.ndarray, " M"]:
    """Assigns each row of the whole target set to the class whose centroid is nearest in cosine distance.

    The centroids are first the means weighted by softmax predictions, then once more the means by the labels just
    assigned, as in the paper. A class that gets no row in the first round keeps its first centroid.

    Args:
        features: (M, D).
        logits: (M, C).

    Returns:
        Labels (M,).

    Raises:
        ValueError: the input is empty or mismatched.
    """
    if not len(features) or len(features) != len(logits):
        raise InputError(f"expected as many features as logits, over 0; found {len(features)}, {len(logits)}")
    f = np.asarray(features, np.float64)
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    unit = f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)

    def nearest(centroids: np.ndarray) -> np.ndarray:
        lengths = np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
        return np.argmax(unit @ (centroids / lengths).T, -1)

    first = p.T @ f / np.maximum(p.sum(0)[:, None], 1e-12)
    hard = np.eye(p.shape[1])[nearest(first)]
    counts = hard.sum(0)[:, None]
    return nearest(np.where(counts > 0, hard.T @ f / np.maximum(counts, 1), first)).astype(np.int32)


class SHOT(DomainLoss):
    """The SHOT loss ``information_maximisation + β CE(pseudo_label)``, over all rows.

    Attributes:
        beta: β; 0.3 in the paper, 0.1 for digits. At 0 (SHOT-IM) the batch needs no ``pseudo_label``.
    """

    beta: float = struct.field(pytree_node=False, default=0.3)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: there is no ``batch["pseudo_label"]``, unless beta is 0.
        """
        logits = layer(outputs, "logits")
        weight = weights(batch, len(logits))
        value = information_maximisation(logits, weight)
        if self.beta:
            label = column(batch, "pseudo_label", "from jtl.domain.centroid_labels")
            value = value + self.beta * mean(cross_entropy(logits, label), weight)
        return value, {}
