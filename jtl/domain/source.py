"""A loss on the source rows alone, over the forward that all terms share."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jtl.domain.loss import column, domains
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs


class Source(Loss):
    """``term`` with the weight of every row that is not source set to 0.

    Labels of target rows are not read: ``jtl.domain.Source(jtl.tasks.Classify()) + 1.0 * jtl.domain.DANN()``.

    Attributes:
        term: a loss that heeds ``batch["weight"]``, as those of ``jtl.tasks`` do.
    """

    term: Loss

    def mode(self) -> Mode | None:
        """That of ``term``."""
        return self.term.mode()

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The value of ``term`` and its metrics. Raises KeyError if the batch has no ``domain``."""
        column(batch, "domain", "0 for source and 1 for target rows")
        rows: Any = batch
        return self.term.value(model, outputs, {**rows, "weight": domains(batch)[0]}, key)
