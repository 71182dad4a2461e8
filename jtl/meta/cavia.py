"""CAVIA: represents a task by a small context vector beside the input; the inner loop adapts only that vector.

Zintgraf et al. 2019, "Fast Context Adaptation via Meta-Learning", https://arxiv.org/abs/1810.03642.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.meta.inner import Rate, TaskLoss
from jtl.meta.maml import maml
from jtl.meta.tasks import Graded
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

NAME = "context"


@dataclass(frozen=True)
class Context:
    """The technique behind ``context``."""

    field: str

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the context appended to each row of the batch's field."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if self.field not in batch:
                found = sorted(batch)
                raise MissingError(f"the context joins batch[{self.field!r}]; the batch is {found}")
            x, own = batch[self.field], variables["params"][NAME]
            wide = jnp.broadcast_to(own, (*x.shape[:-1], own.size))
            return forward(variables, {**batch, self.field: jnp.concatenate([x, wide], -1)}, mode, key)

        return run


def context(model: Model, size: int, field: str = "x") -> Model:
    """Returns ``model`` whose input ``batch[field]`` (..., D) is extended to (..., D + size) by the context.

    The model must take D + ``size`` inputs. The context is the leaf ``params["context"]``, which is zero and stays
    zero in training with ``cavia``. This is the paper's form for fully connected networks; its modulation of
    convolutions is not implemented.

    Args:
        model: the model.
        size: of the context.
        field: the batch field to extend.

    Raises:
        ValueError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError(f"the context needs at least 1 entry, got size={size}")
    return model.with_technique(Context(field), {NAME: jnp.zeros(size)})


def cavia(
    *,
    steps: int,
    rate: Rate,
    first_order: bool = False,
    remat: bool = False,
    chunk: int | None = None,
) -> Any:
    """CAVIA, for ``make_step(loss, optimizer, gradient=cavia(steps=1, rate=1.0))`` on ``context(model, size)``.

    The inner loop moves ``params["context"]`` from zero; the outer loop trains all other leaves, through the inner
    one. To adapt later: ``adapt(..., labels=jtl.finetune.train_only(model, "context"))``. Arguments are those of
    ``maml``. The gradient raises ValueError for a model without a context, or with it frozen.
    """

    def gradient(loss: TaskLoss, trained: PyTree, batch: Batch, key: Array) -> Graded:
        if NAME not in tree.flatten(trained):
            raise InputError(
                "cavia adapts params['context']: add it by jtl.meta.context(model, size), and do not freeze it"
            )
        labels = tree.map_with_path(lambda path, _: float(path == NAME), trained)
        inner = maml(steps=steps, rate=rate, labels=labels, first_order=first_order, remat=remat, chunk=chunk)
        zeroed = lambda values: {**values, NAME: jax.numpy.zeros_like(values[NAME])}  # noqa: E731
        found, gradients = inner(loss, zeroed(trained), batch, key)
        return found, zeroed(gradients)

    return gradient
