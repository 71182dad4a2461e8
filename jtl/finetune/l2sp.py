"""L2-SP: weight decay towards the pretrained parameters instead of towards zero.

Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
https://arxiv.org/abs/1802.01483.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.finetune.anchor import check_leaves
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs


class L2SP(Loss):
    """The L2-SP penalty, ``alpha/2 · ||w - w0||² + beta/2 · ||w_new||²``.

    Li et al. 2018, equation 3. ``w0`` are the leaves of ``anchor``, usually the pretrained parameters without their
    head; ``w_new`` are the model's leaves that the anchor lacks. Add the penalty to a task loss and turn off the
    optimiser's own weight decay. The paper searches alpha in 1e-3 ... 1 with beta = 0.01.

    Attributes:
        anchor: nested dict of pretrained parameters.
        alpha: strength of the pull towards the anchor.
        beta: strength of the decay of new leaves.

    >>> from jtl.wrap import function
    >>> model = function(lambda params: params, {"body": jnp.array([3.0]), "head": jnp.array([2.0])})
    >>> value, aux = L2SP({"body": jnp.array([1.0])}, alpha=0.1, beta=0.01)(model, {}, None)
    >>> round(float(value), 6)  # 0.1/2 · 2² + 0.01/2 · 2²
    0.22
    """

    anchor: PyTree
    alpha: Any
    beta: Any

    def mode(self) -> None:
        """Returns None: the penalty reads only the parameters."""
        return None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the penalty, and its two squared norms as the metrics ``distance`` and ``new``.

        Raises:
            ValueError: the model lacks a leaf of the anchor, or has it in another shape.
        """
        params, anchor = tree.flatten(model.params), tree.flatten(self.anchor)
        check_leaves("the anchor of L2SP", anchor, params)
        distance = _sum_squares(params[path] - anchor[path] for path in anchor)
        new = _sum_squares(params[path] for path in params if path not in anchor)
        return self.alpha / 2 * distance + self.beta / 2 * new, {"distance": distance, "new": new}


def _sum_squares(leaves: Any) -> Float[Array, ""]:
    """The sum of the squares of all entries, in float32."""
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves), jnp.zeros(()))
