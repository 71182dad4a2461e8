"""Self-training on confident predictions: pseudo-labels and FixMatch.

Lee 2013, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
workshop; Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
https://arxiv.org/abs/2001.07685.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, column, domains, layer
from jtl.model import Batch, Model, Outputs
from jtl.rows import cross_entropy, mean


def pseudo_label(
    logits: Float[Array, "M C"],
    labeller: Float[Array, "M C"],
    weight: Float[Array, " M"] | None = None,
    *,
    threshold: float = 0.95,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean over all rows of ``1[max q >= τ] CE(argmax q, p)``, and the share of rows at or above the threshold.

    p = softmax(logits) and q = softmax(labeller), which gets no gradient. Rows below the threshold count as 0 in the
    mean (FixMatch, equation 4), so the loss grows as the model becomes confident.

    Args:
        logits: what is trained.
        labeller: predicts the labels: the same logits, or those of another view or model.
        weight: of each row; 0 leaves it out.
        threshold: τ.
    """
    q = jax.lax.stop_gradient(jax.nn.softmax(labeller.astype(jnp.float32)))
    sure = (q.max(-1) >= threshold).astype(jnp.float32)
    weight = jnp.ones(len(q)) if weight is None else weight
    return mean(sure * cross_entropy(logits, q.argmax(-1)), weight), mean(sure, weight)


class PseudoLabels(DomainLoss):
    """``pseudo_label`` of target rows by the model's own predictions.

    The metric ``confident`` is the share of rows that count.

    Attributes:
        threshold: τ.
    """

    threshold: float = struct.field(pytree_node=False, default=0.95)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: there is no ``batch["domain"]``.
        """
        logits = layer(outputs, "logits")
        loss, share = pseudo_label(logits, logits, domains(batch)[1], threshold=self.threshold)
        return loss, {"confident": share}


class FixMatch(DomainLoss):
    """``pseudo_label`` of the strong views of target rows by their weak views.

    The batch's own input is the weak view. ``batch["strong"]``, of the same shape, holds the strong view, which gets
    its own forward (whose updates of running statistics are dropped). The metric ``confident`` is the share of rows
    that count.

    Attributes:
        field: the batch field with the weak view: the model's input.
        threshold: τ.
    """

    field: str = struct.field(pytree_node=False, default="image")
    threshold: float = struct.field(pytree_node=False, default=0.95)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: ``batch["domain"]``, ``batch["strong"]`` or the model's field is missing.
        """
        target = domains(batch)[1]
        column(batch, self.field, "the weak view")
        strong = column(batch, "strong", "the strong view of each row")
        other, _ = model.run({**batch, self.field: strong}, self.mode(), key)
        logits, weak = layer(other, "logits"), layer(outputs, "logits")
        loss, share = pseudo_label(logits, weak, target, threshold=self.threshold)
        return loss, {"confident": share}
