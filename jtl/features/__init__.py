"""Feature extraction: frozen features computed once, probes on them, and training on top of cached activations."""

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
