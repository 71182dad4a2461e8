"""jtl: transfer learning in JAX as pure functions on parameter trees.

A training step has four slots, and each technique is a function that fills one: *leaves* (which parameters
exist), *labels* (which of them train, and how fast), *loss* (what they minimise) and *gradient* (how the
update is taken).
"""

from jtl.loss import Aux, Loss
from jtl.model import Mode, Model
from jtl.pretrained import load, save

__all__ = [
    "Aux", "Loss", "Mode", "Model",
    "adapters", "continual", "data", "distill", "domain", "features", "finetune", "heads", "layout", "load", "loss",
    "merging", "meta", "model", "pretrained", "progressive", "save", "tasks", "train", "tree", "wrap",
]  # fmt: skip
