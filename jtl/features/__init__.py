"""Feature extraction: frozen features computed once and cached, probes and transferability scores on them.

It also trains the upper layers, or the head alone, on cached activations (``resume_from``, ``head_alone``).
"""

from jtl.features import scores
from jtl.features.cache import DataKey, cached, digest
from jtl.features.probes import Knn, Linear, fit_knn, fit_logistic, fit_ridge
from jtl.features.resume import Resume, head_alone, resume_from, train_above

__all__ = [
    "DataKey",
    "Knn",
    "Linear",
    "Resume",
    "cached",
    "digest",
    "fit_knn",
    "fit_logistic",
    "fit_ridge",
    "head_alone",
    "resume_from",
    "scores",
    "train_above",
]
