"""jtl: transfer learning in JAX as pure functions on parameter trees.

A training step has four slots, and each technique is a function that fills one of them: leaves (which parameters
exist), labels (which of them train, and at what rate), loss (what training minimises) and gradient (how the update
is computed).
"""

from jtl import (
    adapters,
    continual,
    data,
    distill,
    domain,
    ema,
    errors,
    features,
    finetune,
    heads,
    loss,
    measure,
    merging,
    meta,
    model,
    outputs,
    pretrained,
    progressive,
    rows,
    sharding,
    tasks,
    trace,
    train,
    tree,
    wrap,
)
from jtl.errors import UserError
from jtl.loss import Aux, Loss
from jtl.model import Mode, Model, remove
from jtl.pretrained import load, save

__version__ = "0.1.0"

__all__ = [
    "Aux", "Loss", "Mode", "Model", "UserError",
    "adapters", "continual", "data", "distill", "domain", "ema", "errors", "features", "finetune", "heads", "load",
    "loss", "measure", "merging", "meta", "model", "outputs", "pretrained", "progressive", "remove", "rows", "save",
    "sharding", "tasks", "trace", "train", "tree", "wrap",
]  # fmt: skip
