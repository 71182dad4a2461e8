"""Knowledge distillation: what a student learns from a teacher, and students cut out of their teachers.

Losses are pure functions on arrays (``soft_targets``), and ``Loss`` classes of the same names on top of them
(``SoftTargets``), which read the teacher's outputs from the batch: ``Distill(teacher, loss)`` puts them there.
"""

from jtl.distill.attention import AttentionTransfer, attention_map, attention_transfer
from jtl.distill.crd import CRD, crd, memory
from jtl.distill.dist import DIST, dist
from jtl.distill.dkd import DKD, dkd, dkd_parts
from jtl.distill.ema import EMATeacher
from jtl.distill.fsp import FSP, fsp, fsp_matrix
from jtl.distill.hint import Hint, hint
from jtl.distill.mutual import Mutual, peer, peers
from jtl.distill.on_policy import mask_continuations, sample_continuations
from jtl.distill.pkt import PKT, pkt
from jtl.distill.regressor import regressor
from jtl.distill.review import Review, ReviewKD, hierarchical_context
from jtl.distill.rkd import RKD, rkd_angle, rkd_distance
from jtl.distill.sequence import (
    SequenceKD,
    TopKSequenceKD,
    forward_kl,
    forward_kl_top_k,
    generalised_jsd,
    reverse_kl,
    top_k,
)
from jtl.distill.similarity import Similarity, similarity
from jtl.distill.soft_targets import SoftTargets, soft_targets
from jtl.distill.stored import Taught, Views
from jtl.distill.student import choose_layers
from jtl.distill.teacher import Distill
from jtl.distill.term import Term, column, columns
from jtl.distill.widths import choose_widths

__all__ = [
    "CRD", "DIST", "DKD", "FSP", "PKT", "RKD", "AttentionTransfer", "Distill", "EMATeacher", "Hint", "Mutual",
    "Review", "ReviewKD", "SequenceKD", "Similarity", "SoftTargets", "Taught", "Term", "TopKSequenceKD",
    "Views", "attention_map", "attention_transfer", "choose_layers", "choose_widths", "column", "columns",
    "crd", "dist", "dkd", "dkd_parts", "forward_kl", "forward_kl_top_k", "fsp", "fsp_matrix",
    "generalised_jsd", "hierarchical_context", "hint", "mask_continuations", "memory", "peer", "peers", "pkt",
    "regressor", "reverse_kl", "rkd_angle", "rkd_distance", "sample_continuations", "similarity",
    "soft_targets", "top_k",
]  # fmt: skip
