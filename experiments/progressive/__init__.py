"""Progressive networks (Rusu et al. 2016, https://arxiv.org/abs/1606.04671) beside other continual learning methods.

A sequence of tasks is learned one after the other with the same number of updates for every method and task. After each
task, the test accuracy on every task fills the matrix R[i, j]. ``bwt`` (backward transfer) below 0 is forgetting,
``fwt`` (forward transfer) is what was known of a task before it was learned, and ``transfer_score`` the area under the
validation curve relative to a network trained on that task alone (``separate``).

    python -m experiments.progressive --out runs/progressive
    python -m experiments.progressive --sequence permuted_mnist --hidden 1000 1000 --method full joint ewc \
        --ewc-strength 300 --out runs/progressive_ewc

Sequences: ``permuted_mnist`` and ``rotated_mnist`` (Goodfellow et al. 2013, https://arxiv.org/abs/1312.6211; Lopez-Paz
and Ranzato 2017, https://arxiv.org/abs/1706.08840), ``split_mnist`` (Zenke et al. 2017,
https://arxiv.org/abs/1703.04200), ``digits`` (three sources of digits), ``newsgroups`` (four topics for a small
transformer), or ``--data`` with image sets of your own, a task each.
"""

from experiments.progressive.config import Progressive
from experiments.progressive.study import run

__all__ = ["Progressive", "run"]
