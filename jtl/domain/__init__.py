"""Domain adaptation (a labelled source, an unlabelled target) and generalisation (several labelled domains).

Discrepancy losses, adversarial training, self-training and test-time adaptation for an unlabelled target; losses for
several labelled domains; and ``protocol``, which selects models without target labels. Each loss is a term to add to
the supervised loss.
"""

from jtl.domain import protocol
from jtl.domain.adabn import adabn
from jtl.domain.adda import ADDA, discriminator
from jtl.domain.afn import AFN, afn
from jtl.domain.bsp import BSP, bsp
from jtl.domain.cdan import CDAN, conditional_adversary
from jtl.domain.coral import CORAL, coral
from jtl.domain.dann import DANN, Discriminator, adversary, dann
from jtl.domain.group_dro import GroupDRO, group_weights
from jtl.domain.importance import density_ratio, label_shift
from jtl.domain.irm import IRM, irm_penalty
from jtl.domain.jan import JAN, jmmd
from jtl.domain.jdot import JDOT, jdot, sinkhorn
from jtl.domain.loss import DomainLoss, check, domains
from jtl.domain.mcc import MCC, mcc
from jtl.domain.mcd import MCD, alternate, discrepancy, two_heads
from jtl.domain.mdd import MDD, mdd
from jtl.domain.mean_teacher import MeanTeacher, consistency
from jtl.domain.mixup import Mixup, with_mixup
from jtl.domain.mmd import DAN, mmd
from jtl.domain.pseudo_labels import FixMatch, PseudoLabels, pseudo_label
from jtl.domain.reversal import Reversal, ramp, reverse
from jtl.domain.shot import SHOT, centroid_labels, information_maximisation
from jtl.domain.source import Source
from jtl.domain.tent import Tent, adapt, norm_only
from jtl.domain.vrex import VREx, vrex

__all__ = [
    "ADDA", "AFN", "BSP", "CDAN", "CORAL", "DAN", "DANN", "Discriminator", "DomainLoss", "FixMatch", "GroupDRO", "IRM",
    "JAN", "JDOT", "MCC", "MCD", "MDD", "MeanTeacher", "Mixup", "PseudoLabels", "Reversal", "SHOT", "Source", "Tent",
    "VREx",
    "adabn", "adapt", "adversary", "afn", "alternate", "bsp", "centroid_labels", "check", "conditional_adversary",
    "consistency", "coral", "dann", "density_ratio", "discrepancy", "discriminator", "domains", "group_weights",
    "information_maximisation", "irm_penalty", "jdot", "jmmd", "label_shift", "mcc", "mdd",
    "mmd", "norm_only", "protocol", "pseudo_label", "ramp", "reverse", "sinkhorn", "two_heads", "vrex", "with_mixup",
]  # fmt: skip
