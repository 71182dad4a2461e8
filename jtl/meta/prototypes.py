"""Prototypical networks and the nearest-centroid baseline: classify a query by its distance to class means.

Snell et al. 2017, "Prototypical Networks for Few-shot Learning", https://arxiv.org/abs/1703.05175.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.meta.metric import Metric, Scores, class_sums, only_seen, squared_distances, unit
from jtl.model import Model


class Prototypes(Metric):
    """Logits −||f(x) − c_k||², with c_k the mean feature of class k's support (equations 1 and 2).

    Trained with it, a model is a prototypical network. On a pretrained model as it is
    (``Prototypes(...).tasks(model, episodes)``) it is the nearest-centroid baseline.

    Attributes:
        distance: ``"euclidean"``; or ``"cosine"``: logits cos(f(x), c_k).
    """

    distance: Literal["euclidean", "cosine"] = struct.field(pytree_node=False, default="euclidean")

    def scores(
        self, model: Model, support: Array, label: Int[Array, " S"], query: Array, key: Array | None
    ) -> Scores:
        """Returns the logits."""
        centres, counts = prototypes(support, label, self.ways)
        if self.distance == "cosine":
            return only_seen(unit(query) @ unit(centres).T, counts)
        return only_seen(-squared_distances(query, centres), counts)


def prototypes(
    features: Float[Array, "S D"], label: Int[Array, " S"], ways: int
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """Returns the mean feature of each class, and its number of rows; the mean of no rows is 0.

    >>> centres, counts = prototypes(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([1, 1, 0]), ways=2)
    >>> centres[:, 0].tolist(), counts.tolist()
    ([5.0, 2.0], [1.0, 2.0])
    """
    sums, counts = class_sums(features, label, ways)
    return sums / jnp.maximum(counts, 1)[:, None], counts
