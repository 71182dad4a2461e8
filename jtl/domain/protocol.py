"""Model selection for domain adaptation: scores that choose a model or step without target labels. Higher is better.

All read logits or features as ``jtl.outputs.outputs`` returns them and compute in float64 with NumPy. Report the
choice of each score next to the oracle (target labels) and the last step.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int

from jtl.domain.importance import density_ratio
from jtl.errors import InputError

Logits = Float[np.ndarray, "_ C"] | Float[Array, "_ C"]
Labels = Int[np.ndarray, " _"] | Int[Array, " _"]
Rows = Float[np.ndarray, "_ _"] | Float[Array, "_ _"]
Losses = Float[np.ndarray, " _"] | Float[Array, " _"]


def source_validation(logits: Logits, labels: Labels) -> float:
    """Accuracy on held-out *source* rows, in [0, 1].

    Args:
        logits: (N, C).
        labels: (N,).

    Raises:
        ValueError: logits are empty or not finite, or there is not one label per row.
    """
    z = _checked(logits)
    if len(z) != len(labels):
        raise InputError(f"{len(z)} rows of logits and {len(labels)} labels: expected one each")
    return float(np.mean(z.argmax(-1) == np.asarray(labels)))


def negative_entropy(logits: Logits) -> float:
    """Minus the mean entropy of the target predictions, in nats.

    Caveat: a model that predicts one class for everything scores best.

    Raises:
        ValueError: logits are empty or not finite.
    """
    p = _softmax(_checked(logits))
    return -float(np.mean(_entropy(p)))


def mutual_information(logits: Logits) -> float:
    """``H(mean p_i) - mean H(p_i)`` of the target predictions, in nats: high when they are confident and diverse.

    This is the negative of ``information_maximisation``.

    Raises:
        ValueError: logits are empty or not finite.
    """
    p = _softmax(_checked(logits))
    return float(_entropy(p.mean(0, keepdims=True))[0] - np.mean(_entropy(p)))


def soft_neighbourhood_density(logits: Logits, *, temperature: float = 0.05, chunk: int = 1024) -> float:
    """Mean entropy of each target row's similarity to the others: high where predictions lie in dense clusters.

    Similarities are cosines of softmax predictions, divided by the temperature, with a softmax over all other rows.
    Saito et al. 2021, "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood
    Density", https://arxiv.org/abs/2108.10860.

    Args:
        logits: (N, C) of target rows, at least two; scores for different N are not comparable.
        temperature: τ, 0.05 in the paper.
        chunk: rows whose similarities are held at once.

    Raises:
        ValueError: fewer than two rows, or logits that are not finite.
    """
    p = _softmax(_checked(logits))
    if len(p) < 2:
        raise InputError("soft neighbourhood density needs two rows or more")
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    total = 0.0
    for start in range(0, len(unit), chunk):
        similar = unit[start : start + chunk] @ unit.T / temperature
        similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
        total += float(_entropy(_softmax(similar)).sum())
    return total / len(unit)


def deep_embedded_validation(
    source_features: Rows,
    target_features: Rows,
    validation_features: Rows,
    validation_losses: Losses,
) -> float:
    """Minus the target risk, estimated from source validation rows with importance weights and a control variate.

    With weights w of the validation rows (``density_ratio``) and L = w · loss, the risk is ``mean L + η mean w - η``,
    η = -Cov(L, w) / Var(w). You, Wang, Long and Jordan 2019, "Towards Accurate Model Selection in Deep Unsupervised
    Domain Adaptation", ICML 2019.

    Args:
        source_features: the model's features of source training rows (N, D).
        target_features: features of target rows (M, D).
        validation_features: features of held-out source rows (V, D).
        validation_losses: the loss of each held-out row (V,), such as 0-1 loss or cross-entropy.

    Raises:
        ValueError: there are fewer than two losses, not one per validation row, or as ``density_ratio`` does.
    """
    losses = np.asarray(validation_losses, np.float64)
    if len(losses) != len(validation_features) or len(losses) < 2:
        raise InputError(
            f"{len(validation_features)} validation features and {len(losses)} losses: expected one each, at least 2"
        )
    return -controlled_risk(density_ratio(source_features, target_features, validation_features), losses)


def controlled_risk(weights: Losses, losses: Losses) -> float:
    """Computes ``mean wℓ + η mean w - η`` with η = -Cov(wℓ, w) / Var(w), or η = 0 for equal weights."""
    w = np.asarray(weights, np.float64)
    weighted = w * np.asarray(losses, np.float64)
    covariance = np.cov(weighted, w)
    eta = -covariance[0, 1] / covariance[1, 1] if covariance[1, 1] > 0 else 0.0
    return float(weighted.mean() + eta * w.mean() - eta)


def _checked(logits: Logits) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    if not len(z) or not np.isfinite(z).all():
        raise InputError(f"logits must be finite and of one row or more; found shape {z.shape}")
    return z


def _softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)
