"""Meta-learning for few-shot tasks: meta-gradients through an inner loop or without unrolling it, and metric learners.

The gradients go to the ``gradient`` argument of a train step,
``make_step(Classify(), optimizer, labels, gradient=maml(steps=5, rate=0.4))``, with any model and any loss, including
adapters. Metric learners are losses on episodes.
"""

from jtl.meta.cavia import cavia, context
from jtl.meta.cosine import Cosine
from jtl.meta.evaluate import Diverged, make_evaluate
from jtl.meta.imaml import imaml
from jtl.meta.inner import adapt, trajectory
from jtl.meta.maml import maml, step_weights
from jtl.meta.matching import Matching
from jtl.meta.metric import Metric
from jtl.meta.normalise import SupportStats
from jtl.meta.patch_convolution import PatchConv4, PatchResNet12
from jtl.meta.prototypes import Prototypes
from jtl.meta.relation import Relation, RelationNet, with_relation
from jtl.meta.reptile import reptile
from jtl.meta.ridge import Ridge, with_ridge
from jtl.meta.rules import MetaCurvature, MetaSGD, PerStep, learn
from jtl.meta.sharded import sharded

__all__ = [
    "Cosine", "Diverged", "Matching", "MetaCurvature", "MetaSGD", "Metric",
    "PatchConv4", "PatchResNet12", "PerStep", "Prototypes", "Relation",
    "RelationNet", "Ridge", "SupportStats", "adapt", "cavia", "context", "imaml", "learn", "make_evaluate", "maml",
    "reptile", "sharded", "step_weights", "trajectory", "with_relation", "with_ridge",
]  # fmt: skip
