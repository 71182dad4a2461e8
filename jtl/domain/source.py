"""A supervised loss on the source rows alone, to which domain losses are added."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jtl.domain.loss import column, domains
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs


class Source(Loss):
    """``term`` with weight 0 for every row that is not a source row.

    Labels of target rows are not read: ``jtl.domain.Source(jtl.tasks.Classify()) + 1.0 * jtl.domain.DANN()``.

    Attributes:
        term: a loss that respects ``batch["weight"]``, as those of ``jtl.tasks`` do.
    """

    term: Loss

    def mode(self) -> Mode | None:
        """Returns the mode of ``term``."""
        return self.term.mode()

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the value of ``term`` and its metrics.

        Raises:
            KeyError: the batch has no ``domain``.
        """
        column(batch, "domain", "0 for source and 1 for target rows")
        rows: Any = batch
        return self.term.value(model, outputs, {**rows, "weight": domains(batch)[0]}, key)
