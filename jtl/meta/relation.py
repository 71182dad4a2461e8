"""Relation networks: a learned comparison of class and query (Sung et al. 2018, https://arxiv.org/abs/1711.06025)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.errors import InputError, MissingError
from jtl.meta.metric import Metric, Scores, class_sums, only_seen
from jtl.model import Model

NAME = "relation"


class Relation(nn.Module):
    """The comparison of two vectors (..., 2 D): two dense layers, one number (...).

    Attributes:
        hidden: width of the first; the paper's last layers have 8.
    """

    hidden: int = 8

    @nn.compact
    def __call__(self, pair: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """The relation score before its sigmoid."""
        hidden = nn.relu(nn.Dense(self.hidden, name="dense")(pair))
        return nn.Dense(1, name="out")(hidden)[..., 0]


def with_relation(model: Model, module: nn.Module, *, width: int, key: Array) -> Model:
    """``model`` with the leaves of ``module`` under ``params["relation"]``; ``width`` is D of the features.

    Raises ValueError if the module has other collections than parameters.
    """
    variables = module.init(key, jnp.zeros((1, 2 * width)))
    if set(variables) != {"params"}:
        raise InputError(
            f"the relation has the collections {sorted(variables)}; it may have parameters alone"
        )
    kept = {name: leaves for name, leaves in model.params.items() if name != NAME}
    return model.with_params({**kept, NAME: variables["params"]})


class RelationNet(Metric):
    """The mean over query rows and classes of (σ(g([sum of class k's features, f(x)])) − 1[y = k])².

    Sung et al. 2018, equations 1 and 2; over several shots a class is the sum of its features. The paper compares
    *maps* of features by convolutions and sums the squares; here g compares vectors, and the mean changes the scale
    alone. Its leaves are the model's: ``model = with_relation(model, Relation(), width=D, key=key)``.

    Attributes:
        module: g.
    """

    module: nn.Module = struct.field(pytree_node=False, default=Relation())

    def scores(
        self, model: Model, support: Array, label: Int[Array, " S"], query: Array, key: Array | None
    ) -> Scores:
        """g, before its sigmoid. Raises KeyError if the model has no relation."""
        if NAME not in model.params:
            raise MissingError(
                f"RelationNet reads params[{NAME!r}], which the model lacks: add it by with_relation"
            )
        sums, counts = class_sums(support, label, self.ways)
        shape = (len(query), *sums.shape)
        classes, rows = jnp.broadcast_to(sums[None], shape), jnp.broadcast_to(query[:, None], shape)
        pairs = jnp.concatenate([classes, rows], -1)
        found: Any = self.module.apply({"params": model.params[NAME]}, pairs)
        return only_seen(found, counts)

    def cost(self, scores: Scores, label: Int[Array, " Q"]) -> Float[Array, ""]:
        """The squared error of one task; NaN for a label outside the classes."""
        error = jnp.square(jax.nn.sigmoid(scores) - jax.nn.one_hot(label, self.ways))
        known = (label >= 0) & (label < self.ways)
        return jnp.mean(jnp.where(known[:, None], error, jnp.nan))
