"""A teacher that is the student's own moving average: Tarvainen and Valpola 2017, "Mean teachers", arXiv:1703.01780."""

from __future__ import annotations

from jtl.distill.teacher import Distill
from jtl.ema import average_model
from jtl.model import Model


class EMATeacher(Distill, kw_only=True):
    """``Distill`` from the moving average of the student itself, made by ``with_average``.

    ``EMATeacher(Classify() + 0.5 * SoftTargets())``. Student and teacher see one batch; the teacher has no dropout.
    """

    teacher: None = None

    def find(self, model: Model) -> Model:
        """The average."""
        return average_model(model)
