"""Which statistics normalise the query rows of an episode: a choice that changes few-shot results.

* ``"transductive"``: support and query each by its own batch, so a query row's prediction depends on the others;
* ``"support"``: both by the support's statistics;
* ``"running"``: both by the model's running statistics.

For models without batch normalisation the choice makes no difference, and ``"support"`` raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.loss import Aux, Loss
from jtl.model import Batch, Mode, Model, Outputs, State

Normalise = Literal["transductive", "support", "running"]


def run_episode(
    model: Model, support: Batch, query: Batch, normalise: Normalise, key: Array | None
) -> tuple[Outputs, Outputs, State]:
    """Returns the outputs of support and query, and the collections that the forwards updated.

    Args:
        model: the model.
        support: a batch.
        query: a batch.
        normalise: one of the three choices.
        key: for dropout.

    Raises:
        ValueError: ``"support"`` for a model without ``nn.BatchNorm``.
    """
    first, second = (None, None) if key is None else jax.random.split(key)
    if normalise == "support":
        return run_by_support(model, support, query, Mode(train=True, stats="batch"), first)
    mode = Mode(train=True, stats="batch" if normalise == "transductive" else "running")
    known, state = model.run(support, mode, first)
    model = model.replace(variables={**model.variables, **state})
    asked, after = model.run(query, mode, second)
    return known, asked, {**state, **after}


def run_by_support(
    model: Model, support: Batch, query: Batch, mode: Mode, key: Array | None
) -> tuple[Outputs, Outputs, State]:
    """Runs support and query rows in one forward, with batch normalisation by the statistics of the support rows.

    Raises:
        ValueError: the model has no ``nn.BatchNorm``, or one whose input does not have one row per example.
    """
    s, q = (jax.tree.leaves(part)[0].shape[0] for part in (support, query))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *_shared(support, query))
    met: list[str] = []

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, nn.BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        met.append("/".join(context.module.path))
        x = args[0]
        if x.shape[0] != s + q:
            raise InputError(
                f"normalising by the support needs one row an example at {met[-1]}; found shape {x.shape} for "
                f"{s} support and {q} query rows"
            )
        of_support = jnp.expand_dims(jnp.arange(s + q) < s, tuple(range(1, x.ndim)))
        return call(*args, **{**kwargs, "mask": of_support})

    with nn.intercept_methods(intercept):
        outputs, state = model.run(joined, mode, key)
    if not met:
        raise InputError(
            "normalising by the support needs a model with nn.BatchNorm, and this one has none: its layers do not "
            "mix rows, so choose 'running'"
        )
    rows = lambda part: jax.tree.map(lambda x: x[part], outputs)  # noqa: E731
    return rows(slice(None, s)), rows(slice(s, None)), state


def _shared(support: Any, query: Any) -> tuple[Any, Any]:
    if not isinstance(support, Mapping):
        return support, query
    both = [name for name in support if name in query]
    return {name: support[name] for name in both}, {name: query[name] for name in both}


class SupportStats(Loss):
    """``loss`` with batch normalisation by the support's statistics, for support and query alike.

    ``make_step(SupportStats(Classify(stats="batch")), optimizer, gradient=maml(...))``. It reads the support from
    ``batch["support"]``, which the gradients of ``jtl.meta`` put into the query batch; a batch without it is itself a
    support.

    Attributes:
        loss: a loss that uses ``stats="batch"``.
    """

    loss: Loss

    def __call__(self, model: Model, batch: Batch, key: Array | None) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of the batch's own rows.

        Raises:
            ValueError: ``loss`` does not use batch statistics, or the model has no ``nn.BatchNorm``.
        """
        mode = self.loss.mode()
        if mode is None or mode.stats != "batch":
            raise InputError(
                f"SupportStats takes batch statistics, but its loss asks for {mode}: give it stats='batch'"
            )
        if "support" not in batch:
            return self.loss(model, batch, key)
        query = {name: value for name, value in batch.items() if name != "support"}
        _, outputs, state = run_by_support(model, batch["support"], query, mode, key)
        value, metrics = self.loss.value(model, outputs, query, key)
        return value, Aux({**metrics, "loss": value}, state)
