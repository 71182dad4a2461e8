"""Transferability scores: estimate which pretrained model suits a data set before fine-tuning any of them.

Higher is better. Each score needs one forward of the data through the candidate model. Scores compare candidates on
the *same* data; none of them compares data sets. ``logme``, ``h_score`` and ``shrunk_h_score`` read features; ``leep``
and ``nce`` read the predictions of the model's own classifier. All compute in float64 with NumPy whatever the input
type, because the evidence of 1,000 examples is a sum of numbers that cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError

Features = Float[np.ndarray, "N D"] | Float[Array, "N D"]
Probabilities = Float[np.ndarray, "N Z"] | Float[Array, "N Z"]
Labels = Int[np.ndarray, " N"] | Int[Array, " N"]


def logme(features: Features, labels: Labels, *, tolerance: float = 1e-8, steps: int = 10_000) -> float:
    """LogME: the log of the maximum evidence of a Bayesian linear map from features to one-hot labels, per example.

    For each class, y in {0, 1} is modelled as N(f·w, 1/β) with prior w ~ N(0, 1/α), and the evidence

        ½ · [D ln α + N ln β − Σ ln(α + βσ) − β·||y − Fm||² − α·||m||² − N ln 2π] / N

    is maximised over α and β; σ are the D squared singular values of F, m is the posterior mean. The result is the
    mean over the classes that occur. You, Liu, Wang and Long 2021, "LogME: Practical Assessment of Pre-trained Models
    for Transfer Learning", https://arxiv.org/abs/2102.11005, section 4 (evidence and its maximisation). Here the fixed
    point γ = Σ σ/(σ + α/β), α = γ/||m||², β = (N − γ)/||y − Fm||² runs to convergence; the original stops after a few
    rounds. At the maximum β·||y − Fm||² + α·||m||² = N, so only the ratio t = α/β needs iterating, and features that
    fit y exactly stay finite.

    Args:
        features: (N, D).
        labels: (N,) class of each example; any integers, at least two different ones.
        tolerance: relative change of t at which the iteration stops.
        steps: the maximum number of iterations per class.

    Raises:
        ValueError: empty, non-finite or mismatched input, a single class, or features that are all zero.
    """
    f, classes, y = _checked(features, labels)
    N, D = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    if s[0] == 0:
        raise InputError("features: every value is zero, so no evidence has a maximum")
    sigma = np.where(s > max(N, D) * np.finfo(float).eps * s[0], s**2, 0.0)
    evidence = []
    for c in range(len(classes)):
        target = (y == c).astype(np.float64)
        inside = (u.T @ target) ** 2
        outside = max(target.sum() - inside.sum(), 0.0) if N > len(s) else 0.0

        def moments(t: float, inside=inside, outside=outside) -> tuple[float, float, float]:
            residual = outside + np.sum((t / (t + sigma)) ** 2 * inside)
            return np.sum(sigma / (t + sigma)), np.sum(sigma * inside / (t + sigma) ** 2), residual

        # Outside these bounds the evidence is flat in t to float64: pure signal below, pure noise above.
        low, high = 1e-12 * s[0] ** 2, 1e12 * s[0] ** 2
        t = s[0] ** 2 / len(s)
        for _ in range(steps):
            gamma, norm, residual = moments(t)
            if norm <= 0 or N - gamma <= 0:
                break
            before, t = t, float(np.clip(gamma / norm * residual / (N - gamma), low, high))
            if abs(t - before) <= tolerance * before:
                break
        _, norm, residual = moments(t)
        beta = N / (residual + t * norm)
        log_det = np.sum(np.log1p(sigma / t))  # Σ ln(α + βσ) − D ln α
        evidence.append((N * np.log(beta) - log_det - N - N * np.log(2 * np.pi)) / (2 * N))
    return float(np.mean(evidence))


def leep(source_probabilities: Probabilities, labels: Labels) -> float:
    """LEEP, the log expected empirical prediction: the mean over examples of ln Σ_z P(y|z) θ(x)_z.

    P(y|z) = P(y, z) / P(z), with P(y, z) the mean over all examples of θ(x)_z [label = y]. A source class z to which
    no example gives any probability, where P(y|z) would be 0/0, is left out of the sum. Nguyen, Hassner, Seeger and
    Archambeau 2020, "LEEP: A New Measure to Evaluate Transferability of Learned Representations",
    https://arxiv.org/abs/2002.12462, section 3, equations 1 and 2.

    Args:
        source_probabilities: (N, Z), θ(x): the pretrained classifier's probabilities for each example; rows sum to
            one.
        labels: (N,) class of each example in the new task; any integers.

    Returns:
        The score in nats, at most 0.

    Raises:
        ValueError: the input is empty or mismatched, or its rows are not probabilities.
    """
    theta, classes, y = _checked(source_probabilities, labels, "source_probabilities", least=1)
    if theta.min() < 0 or np.abs(theta.sum(1) - 1).max() > 1e-3:
        raise InputError(
            "source_probabilities: rows must be non-negative and sum to 1 (softmax of the logits); found values "
            f"from {theta.min():.3g} and sums from {theta.sum(1).min():.3g} to {theta.sum(1).max():.3g}"
        )
    theta = theta / theta.sum(1, keepdims=True)
    joint = np.stack([theta[y == c].sum(0) for c in range(len(classes))])
    marginal = joint.sum(0)
    conditional = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    return float(np.mean(np.log(np.sum(conditional[y] * theta, 1))))


def nce(source_labels: Labels, labels: Labels) -> float:
    """NCE, the negative conditional entropy −H(Y|Z) of the labels given the source model's labels, in nats, at most 0.

    −H(Y|Z) = Σ_{y,z} P(y, z) ln P(y|z) with empirical frequencies. Tran, Nguyen and Hassner 2019, "Transferability and
    Hardness of Supervised Classification Tasks", https://arxiv.org/abs/1908.08142, section 4.

    Args:
        source_labels: (N,) the class that the pretrained classifier predicts for each example; any integers.
        labels: (N,) its class in the new task; any integers.

    Raises:
        ValueError: either is empty or does not hold integers, or their lengths differ.
    """
    _, z = np.unique(_integers(source_labels, "source_labels"), return_inverse=True)
    _, y = np.unique(_integers(labels, "labels"), return_inverse=True)
    if len(z) != len(y):
        raise InputError(
            f"source_labels and labels: expected one each an example, found {len(z)} and {len(y)}"
        )
    joint = np.zeros((y.max() + 1, z.max() + 1))
    np.add.at(joint, (y, z), 1 / len(y))
    log_conditional = np.log(joint, out=np.zeros_like(joint), where=joint > 0) - np.log(joint.sum(0))
    return float(np.sum(joint * log_conditional))


def h_score(features: Features, labels: Labels) -> float:
    """H-score, tr(pinv(cov f) · cov(E[f|y])): how much of the whitened features' variance lies between classes.

    It ranges from 0 to min(rank, classes − 1), and always reaches the maximum when there are as many features as
    examples: then use ``shrunk_h_score``. Bao et al. 2019, "An Information-Theoretic Approach to Transferability in
    Task Transfer Learning", ICIP 2019, definition of the H-score.

    Args:
        features: (N, D).
        labels: (N,); any integers, at least two different ones.

    Raises:
        ValueError: empty, non-finite or mismatched input, or a single class.
    """
    f, classes, y = _checked(features, labels)
    f = f - f.mean(0)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    u = u[:, s > max(f.shape) * np.finfo(float).eps * s[0]]  # whitened features, over √N
    return float(sum(np.sum(u[y == c].sum(0) ** 2) / np.sum(y == c) for c in range(len(classes))))


def shrunk_h_score(features: Features, labels: Labels) -> float:
    """The H-score with the Ledoit-Wolf covariance, tr(cov_δ(f)⁻¹ · (1 − δ) cov(E[f|y])), for few examples.

    ``ledoit_wolf`` computes cov_δ and δ. Ibrahim, Ponomareva and Mazumder 2021, "Newer is not always better:
    Rethinking transferability metrics, their peculiarities, stability and performance",
    https://arxiv.org/abs/2110.06893, section on the shrinkage-based H-score. Arguments and errors are those of
    ``h_score``.
    """
    f, classes, y = _checked(features, labels)
    covariance, shrinkage = ledoit_wolf(f)
    means = np.stack([f[y == c].mean(0) for c in range(len(classes))]) - f.mean(0)
    share = np.bincount(y) / len(y)
    between = (means.T * share) @ means
    return float((1 - shrinkage) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


def ledoit_wolf(features: Features) -> tuple[Float[np.ndarray, "D D"], float]:
    """The shrunk covariance (1 − δ) S + δ (tr S / D) I with the least expected squared error, and its δ in [0, 1].

    S is the covariance of the features (N, D), divided by N. δ = min(b², d²) / d² with d² = ||S − (tr S / D) I||² and
    b² = Σ_i ||x_i x_iᵀ − S||² / N², norms divided by D. Ledoit and Wolf 2004, "A well-conditioned estimator for
    large-dimensional covariance matrices", https://doi.org/10.1016/S0047-259X(03)00096-4, section 3.
    """
    x = _matrix(features, "features")
    x = x - x.mean(0)
    N, D = x.shape
    S = x.T @ x / N
    mean = np.trace(S) / D
    d2 = (np.sum(S**2) - D * mean**2) / D
    b2 = (np.sum(np.sum(x**2, 1) ** 2) - N * np.sum(S**2)) / (N**2 * D)
    shrinkage = float(min(max(b2, 0.0), d2) / d2) if d2 > 0 else 0.0
    return (1 - shrinkage) * S + shrinkage * mean * np.eye(D), shrinkage


def weighted_tau(scores: Sequence[float], accuracies: Sequence[float]) -> float:
    """Kendall's τ between scores and accuracies of the same models, weighted towards the best models.

    1 when both rank the models alike, −1 when reversed. Weights are hyperbolic, averaged over the ranking by scores
    and the ranking by accuracies: ``scipy.stats.weightedtau``, as in the evaluation of LogME. Vigna 2015, "A Weighted
    Correlation Index for Rankings with Ties", https://arxiv.org/abs/1404.3325.

    Args:
        scores: one for each model.
        accuracies: one for each model, in the same order.

    Returns:
        τ; NaN when all scores or all accuracies are equal.

    Raises:
        ValueError: fewer than two models, or lists of different length.
    """
    from scipy.stats import weightedtau

    if len(scores) != len(accuracies) or len(scores) < 2:
        raise InputError(
            f"expected one score and one accuracy for each of two or more models, found {len(scores)} scores "
            f"and {len(accuracies)} accuracies"
        )
    return float(weightedtau(scores, accuracies).statistic)


def _matrix(values, name: str) -> np.ndarray:
    matrix = np.asarray(values, np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"{name}: expected shape (N, D) with at least one entry, found {matrix.shape}")
    if not np.isfinite(matrix).all():
        bad = np.flatnonzero(~np.isfinite(matrix).all(1))
        raise InputError(
            f"{name}: {len(bad)} of {len(matrix)} rows have NaN or infinity, the first is {bad[0]}"
        )
    return matrix


def _integers(values, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name}: expected integers of shape (N,), N > 0; found {array.dtype} of shape {array.shape}"
        )
    return array


def _checked(values, labels, name: str = "features", least: int = 2):
    """The matrix in float64, the classes that occur, and each example's class as an index into them."""
    matrix, array = _matrix(values, name), _integers(labels, "labels")
    if len(matrix) != len(array):
        raise InputError(f"{name} and labels: expected as many rows, found {len(matrix)} and {len(array)}")
    classes, index = np.unique(array, return_inverse=True)
    if len(classes) < least:
        raise InputError(f"labels: expected at least {least} classes, found only class {classes[0]}")
    return matrix, classes, index
