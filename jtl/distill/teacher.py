"""``Distill``: runs a teacher on each batch and adds its outputs as columns of the batch."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jtl.distill.term import Term, columns, read, taps
from jtl.errors import InputError
from jtl.loss import Aux, Loss, Sum
from jtl.model import Batch, Mode, Model, Outputs


class Distill(Loss):
    """``loss`` with the teacher's outputs in the batch: one forward of the teacher serves all terms of the loss.

    The teacher runs without dropout and with running statistics, has no gradient and no optimiser state, and computes
    in bfloat16 if ``jtl.model.cast`` made it so. ``Classify() + 0.5 * Distill(teacher, SoftTargets())`` and
    ``Distill(teacher, Classify() + 0.5 * SoftTargets())`` are the same loss. A ``crd`` memory needs the second form,
    because its student's forward reads the teacher. For several teachers, add several ``Distill``.

    Attributes:
        teacher: any model.
        loss: a distillation loss, or a sum in which some are.

    >>> import jax.numpy as jnp
    >>> from jtl.wrap import function
    >>> from jtl.distill.soft_targets import SoftTargets
    >>> net = lambda params, x: {"logits": x @ params["w"]}
    >>> small, large = (function(net, {"w": scale * jnp.eye(2)}) for scale in (1.0, 3.0))
    >>> loss = Distill(large, SoftTargets(temperature=2.0))
    >>> round(float(loss(small, {"x": jnp.eye(2)}, None)[0]), 4)
    0.361
    """

    teacher: Any  # a Model, or None in subclasses that find it elsewhere
    loss: Loss

    def mode(self) -> Mode | None:
        """Returns the mode of the inner loss."""
        return self.loss.mode()

    def find(self, model: Model) -> Model:
        """Returns the teacher of the student ``model``."""
        return self.teacher

    def fill(self, model: Model, batch: Batch) -> dict[str, Any]:
        """Returns ``batch`` with the columns that the terms read.

        Raises:
            ValueError: no term reads a teacher.
            KeyError: the teacher lacks an output that a term reads; near misses are listed.
        """
        terms = self.loss.terms if isinstance(self.loss, Sum) else (self.loss,)
        names = tuple(
            dict.fromkeys(name for term in terms if isinstance(term, Term) for name in term.teacher_names())
        )
        if not names:
            raise InputError(f"Distill: no term of {type(self.loss).__name__} reads a teacher")
        outputs = self.find(model)(batch, taps=taps(names))
        found = {name: read(outputs, name) for name in names}
        return {**batch, **jax.lax.stop_gradient(columns(found))}

    def __call__(self, model: Model, batch: Batch, key: Array | None) -> tuple[Float[Array, ""], Aux]:
        """Returns the inner loss on the batch with the teacher's columns; raises as ``fill`` does."""
        return self.loss(model, self.fill(model, batch), key)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the inner loss and its metrics; raises as ``fill`` does."""
        return self.loss.value(model, outputs, self.fill(model, batch), key)
