"""Self-distillation from the student's own moving average.

Tarvainen and Valpola 2017, "Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results", https://arxiv.org/abs/1703.01780.
"""

from __future__ import annotations

from jtl.distill.teacher import Distill
from jtl.ema import average_model
from jtl.model import Model


class EMATeacher(Distill, kw_only=True):
    """``Distill`` from the moving average of the student itself, which ``jtl.ema.with_average`` adds.

    ``EMATeacher(Classify() + 0.5 * SoftTargets())``. Student and teacher see the same batch; the teacher has no
    dropout.
    """

    teacher: None = None

    def find(self, model: Model) -> Model:
        """Returns the averaged model."""
        return average_model(model)
