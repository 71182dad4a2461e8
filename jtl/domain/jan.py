"""JAN: the MMD between the joint distributions of several layers, under the product of their kernels.

Long et al. 2017, "Deep Transfer Learning with Joint Adaptation Networks", https://arxiv.org/abs/1605.06636.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, domains, layer
from jtl.domain.mmd import Estimator, joint_mmd
from jtl.model import Batch, Model, Outputs


def jmmd(
    sources: Sequence[Float[Array, "N _"]],
    targets: Sequence[Float[Array, "M _"]],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
    *,
    estimator: Estimator = "biased",
) -> Float[Array, ""]:
    """The squared MMD under ``Π_l k_l(x_l, y_l)``; each layer's kernel and the estimators are those of ``mmd``.

    Args:
        sources: the layers of the source rows, each (N, D_l).
        targets: the same layers of the target rows, (M, D_l).
        source_weight: of each source row.
        target_weight: of each target row.
        estimator: ``"biased"``, ``"unbiased"`` or ``"linear"`` (the paper's).

    Raises:
        ValueError: as ``mmd`` does.
    """
    return joint_mmd(sources, targets, source_weight, target_weight, estimator=estimator)


class JAN(DomainLoss):
    """The JAN loss: ``jmmd`` of the layers ``on`` and the softmax predictions.

    Attributes:
        on: the layers, in addition to the predictions.
        estimator: see ``jmmd``.
    """

    on: tuple[str, ...] = struct.field(pytree_node=False, default=("features",))
    estimator: Estimator = struct.field(pytree_node=False, default="biased")

    def layers(self) -> tuple[str, ...]:
        """Returns ``on``."""
        return self.on

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: a layer or ``batch["domain"]`` is missing.
        """
        layers = [layer(outputs, name) for name in self.on] + [jax.nn.softmax(layer(outputs, "logits"))]
        return jmmd(layers, layers, *domains(batch), estimator=self.estimator), {}
