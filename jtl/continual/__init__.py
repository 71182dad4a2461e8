"""Continual learning: one network for a sequence of tasks, learned without forgetting the earlier ones.

Replay, A-GEM, PackNet and task-specific heads; the penalties EWC and SI are in ``jtl.finetune``.
"""

from jtl.continual import packnet
from jtl.continual.agem import agem
from jtl.continual.rehearse import Rehearse
from jtl.continual.task_heads import TaskHeads, task_heads

__all__ = ["Rehearse", "TaskHeads", "agem", "packnet", "task_heads"]
