"""A multi-layer perceptron, such as the 40-40 network for MAML's sinusoids (https://arxiv.org/abs/1703.03400)."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense layers with ReLU, used as ``jtl.model.linen(module, module.init(key, x))``.

    Returns ``features`` (B, last hidden) and, with ``outputs``, ``prediction`` (B, outputs) from the layer ``out``.

    Attributes:
        hidden: widths of the hidden layers.
        outputs: width of a linear layer on top, or None for features alone.
    """

    hidden: tuple[int, ...] = (40, 40)
    outputs: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> dict[str, Array]:
        """Apply the layers."""
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        outputs = {"features": x}
        if self.outputs is not None:
            outputs["prediction"] = nn.Dense(self.outputs, name="out")(x)
        return outputs
