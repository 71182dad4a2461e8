"""R2-D2: a ridge-regression head that is solved in closed form in each task.

Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers", https://arxiv.org/abs/1805.08136.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jtl.errors import InputError, MissingError
from jtl.meta.metric import Metric, Scores
from jtl.model import Model

NAME = "ridge"


def with_ridge(model: Model, *, regularisation: float = 1.0, scale: float = 1.0) -> Model:
    """Returns ``model`` with the two learned numbers of ``Ridge`` in ``params["ridge"]``.

    They are stored as logarithms, so that both stay positive.

    Raises:
        ValueError: ``regularisation`` or ``scale`` is not above 0.
    """
    if regularisation <= 0 or scale <= 0:
        raise InputError(f"regularisation and scale must be over 0, got {regularisation} and {scale}")
    own = {
        "log_regularisation": jnp.asarray(math.log(regularisation), jnp.float32),
        "log_scale": jnp.asarray(math.log(scale), jnp.float32),
    }
    kept = {name: leaves for name, leaves in model.params.items() if name != NAME}
    return model.with_params({**kept, NAME: own})


def ridge(
    features: Float[Array, "S D"], targets: Float[Array, "S N"], regularisation: Float[Array, ""]
) -> Float[Array, "D N"]:
    """Returns the W that minimises ||X W − Y||² + λ ||W||², as Xᵀ (X Xᵀ + λI)⁻¹ Y.

    The system has S rows, however wide X is.

    Args:
        features: X.
        targets: Y.
        regularisation: λ.
    """
    gram = features @ features.T + regularisation * jnp.eye(len(features), dtype=features.dtype)
    return features.T @ jnp.linalg.solve(gram, targets)


class Ridge(Metric):
    """Logits α · f(x) W, with W the ridge regression of the one-hot labels on the support's features.

    The outer loop learns λ and α; ``model = with_ridge(model)``. The paper's bias β, one number added to all logits,
    cancels in the softmax and is left out. A class without a support row has W = 0.
    """

    def scores(
        self, model: Model, support: Array, label: Int[Array, " S"], query: Array, key: Array | None
    ) -> Scores:
        """Returns the logits.

        Raises:
            KeyError: the model lacks the two numbers.
        """
        if NAME not in model.params:
            raise MissingError(f"Ridge reads params[{NAME!r}], which the model lacks: add it by with_ridge")
        own = jax.tree.map(jnp.exp, model.params[NAME])
        weights = ridge(support, jax.nn.one_hot(label, self.ways), own["log_regularisation"])
        return own["log_scale"] * (query @ weights)
