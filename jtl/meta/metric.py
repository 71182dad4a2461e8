"""Metric learners: query rows are classified by comparing them with the support rows, without an inner loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.errors import MissingError
from jtl.loss import Aux, Loss
from jtl.meta.normalise import Normalise, run_episode
from jtl.meta.tasks import count
from jtl.model import Batch, Model, Outputs

Scores = Float[Array, "Q N"]


class Metric(Loss, kw_only=True):
    """Base of the metric learners: the mean over tasks of the query cross-entropy of ``scores``, in nats.

    A batch is ``{"support": ..., "query": ...}``, each with a leading axis of tasks and ``label`` in 0 ... N − 1
    (``jtl.data.episodes``). A class without a support row has the score −inf.

    In a sum of losses it runs its own forward, and updated running statistics are lost: add it where they are not
    used, or train with it alone.

    Attributes:
        ways: N.
        normalise: which statistics batch normalisation uses: see ``jtl.meta.normalise``. There is no default, because
            results depend on it.
        on: the output of the model that it reads.
    """

    ways: int = struct.field(pytree_node=False)
    normalise: Normalise = struct.field(pytree_node=False)
    on: str = struct.field(pytree_node=False, default="features")

    def scores(
        self, model: Model, support: Array, label: Int[Array, " S"], query: Array, key: Array | None
    ) -> Scores:
        """Returns the logits of the query rows, from the features of both."""
        raise TypeError(f"{type(self).__name__} does not define scores(model, support, label, query, key)")

    def cost(self, scores: Scores, label: Int[Array, " Q"]) -> Float[Array, ""]:
        """Returns the loss of one task."""
        # The loss is not finite for a label outside the classes, or for a class without support.
        hit = jnp.take_along_axis(jax.nn.log_softmax(scores), label[:, None], 1, mode="fill")
        return -jnp.mean(hit)

    def tasks(
        self, model: Model, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, " T"], dict[str, Float[Array, " T"]], Any]:
        """Returns the loss and the metrics of each task, and the updated collections, averaged over tasks."""
        tasks = count(batch)

        def one(episode: Any, key: Array | None) -> Any:
            below, above = (None, None) if key is None else jax.random.split(key)
            support, query = episode["support"], episode["query"]
            known, asked, state = run_episode(model, support, query, self.normalise, below)
            scores = self.scores(model, self._read(known), support["label"], self._read(asked), above)
            scores = scores.astype(jnp.float32)
            hits = jnp.argmax(scores, -1) == query["label"]
            return self.cost(scores, query["label"]), jnp.mean(hits), state

        keys = None if key is None else jax.random.split(key, tasks)
        losses, accuracy, state = jax.vmap(one, (0, None if key is None else 0))(batch, keys)
        state = jax.tree.map(lambda x: jnp.mean(x, 0).astype(x.dtype), state)
        return losses, {"accuracy": accuracy, "loss": losses}, state

    def mode(self) -> None:
        """Returns None: it runs its own forwards, one task at a time."""
        return None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the mean over tasks, and the mean ``accuracy``."""
        value, aux = self(model, batch, key)
        return value, {"accuracy": aux.metrics["accuracy"]}

    def __call__(self, model: Model, batch: Batch, key: Array | None) -> tuple[Float[Array, ""], Aux]:
        """Returns the value on a batch of episodes, its metrics and the model's updated state."""
        losses, metrics, state = self.tasks(model, batch, key)
        return jnp.mean(losses), Aux({name: jnp.mean(found) for name, found in metrics.items()}, state)

    def _read(self, outputs: Outputs) -> Array:
        if self.on not in outputs:
            raise MissingError(
                f"{type(self).__name__} reads output {self.on!r}; the model gives {sorted(outputs)}"
            )
        return outputs[self.on]


def squared_distances(a: Float[Array, "A D"], b: Float[Array, "B D"]) -> Float[Array, "A B"]:
    """Returns ||a_i − b_j||²."""
    return jnp.sum(jnp.square(a[:, None] - b[None]), -1)


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns rows scaled to length 1; a row of zeros stays zero."""
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def class_sums(
    features: Float[Array, "S ..."], label: Int[Array, " S"], ways: int
) -> tuple[Float[Array, "N ..."], Float[Array, " N"]]:
    """Returns the sum of the features of each class, and its number of rows."""
    member = jax.nn.one_hot(label, ways, dtype=features.dtype)
    return jnp.tensordot(member, features, (0, 0)), jnp.sum(member, 0)


def only_seen(scores: Scores, counts: Float[Array, " N"]) -> Scores:
    """Returns ``scores``, with −inf for classes without a support row."""
    return jnp.where(counts[None] > 0, scores, -jnp.inf)
