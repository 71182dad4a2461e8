"""Fine-tuning: choose which parameters train and at what rate, and penalise moving away from pretrained values.

``labels`` builds the tree of rates that a train step takes; ``L2SP``, ``EWC`` and ``SI`` are penalties to add to a
loss; ``put_head`` is the start of LP-FT.
"""

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
