"""Fine-tuning: which parameters train and how fast, and what keeps them near where they were."""

from jtl.finetune.ewc import EWC, consolidate, fisher
from jtl.finetune.l2sp import L2SP
from jtl.finetune.labels import depths, freeze, gradual_unfreezing, layerwise, train_all, train_only
from jtl.finetune.lp_ft import put_head
from jtl.finetune.si import SI, path_importance, track

__all__ = [
    "EWC",
    "L2SP",
    "SI",
    "consolidate",
    "depths",
    "fisher",
    "freeze",
    "gradual_unfreezing",
    "layerwise",
    "path_importance",
    "put_head",
    "track",
    "train_all",
    "train_only",
]
