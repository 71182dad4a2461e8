"""MK-MMD and DAN: the distance between two domains' mean embeddings under several Gaussian kernels.

Long et al. 2015, "Learning Transferable Features with Deep Adaptation Networks", https://arxiv.org/abs/1502.02791; the
estimators are those of Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, layer, pair, source_and_target
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean, squared_distances

Estimator = Literal["biased", "unbiased", "linear"]
SCALES = tuple(2.0**k for k in range(-3, 2))


def mmd(
    source: Float[Array, "N D"],
    target: Float[Array, "M E"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
    *,
    estimator: Estimator = "biased",
) -> Float[Array, ""]:
    """The squared MMD under the kernel ``Σ_k exp(-||x - y||² / (2 · 2^k · v))``, k = -3 ... 1.

    v is the mean of ||x - y||² over all pairs of different rows of both domains together; it gets no gradient.
    Estimators: ``"biased"``, means over all pairs, never below 0; ``"unbiased"``, without pairs of a row with itself;
    ``"linear"``, over consecutive disjoint pairs of rows, O(N) (DAN's).

    Args:
        source: features (N, D).
        target: features (M, D).
        source_weight: of each source row; 0 leaves it out.
        target_weight: of each target row.
        estimator: one of the three.

    Returns:
        The estimate, or 0 where it is undefined: no row of a domain has weight, or, unless ``"biased"``, only one.

    Raises:
        ValueError: feature sizes differ, or an array has fewer than two rows (unless ``"biased"``).
    """
    return joint_mmd((source,), (target,), source_weight, target_weight, estimator=estimator)


def joint_mmd(
    sources: Sequence[Array],
    targets: Sequence[Array],
    source_weight: Array | None = None,
    target_weight: Array | None = None,
    *,
    estimator: Estimator = "biased",
) -> Float[Array, ""]:
    """The squared MMD under the product of the layers' kernels, each with its own bandwidth; see ``jmmd``."""
    layers = [pair(x, y, source_weight, target_weight) for x, y in zip(sources, targets, strict=True)]
    _, _, a, b = layers[0]
    if estimator != "biased" and min(len(a), len(b)) < 2:
        raise InputError(
            f"MMD's {estimator} estimator needs two rows of each domain, found {len(a)} and {len(b)}"
        )
    variances = [_variance(*one) for one in layers]

    def kernel(which: Callable[..., tuple[Array, Array]], squares: Callable[[Array, Array], Array]) -> Array:
        product: Array | float = 1.0
        for (x, y, _, _), v in zip(layers, variances, strict=True):
            product = product * _gaussians(squares(*which(x, y)), v)
        return jnp.asarray(product)

    if estimator == "linear":
        return _linear(kernel, a, b)
    within = jnp.ones((len(a), len(a))), jnp.ones((len(b), len(b)))
    if estimator == "unbiased":
        within = within[0] - jnp.eye(len(a)), within[1] - jnp.eye(len(b))
    parts = [
        (kernel(lambda x, y: (x, x), squared_distances), a[:, None] * a[None] * within[0]),
        (kernel(lambda x, y: (y, y), squared_distances), b[:, None] * b[None] * within[1]),
        (kernel(lambda x, y: (x, y), squared_distances), a[:, None] * b[None]),
    ]
    ss, tt, st = (mean(k.ravel(), w.ravel()) for k, w in parts)
    defined = jnp.stack([jnp.sum(w) > 0 for _, w in parts]).all()
    return jnp.where(defined, ss + tt - 2 * st, 0.0)


def _gaussians(squares: Array, variance: Array) -> Array:
    return sum((jnp.exp(-squares / (2 * scale * variance)) for scale in SCALES), jnp.zeros(()))


def _variance(x: Array, y: Array, a: Array, b: Array) -> Float[Array, ""]:
    """The mean of ||x - y||² over pairs of different rows, in O(N): Σ_ij w_i w_j d_ij² = 2 W Σ_i w_i ||x_i - m||²."""
    z, w = jnp.concatenate([x, y]), jnp.concatenate([a, b])
    total, centre = jnp.sum(w), mean(z, w)[None]
    spread = 2 * total * jnp.sum(w * jnp.sum(jnp.square(z - centre), 1))
    pairs = jnp.square(total) - jnp.sum(jnp.square(w))
    found = spread / jnp.where(pairs > 0, pairs, 1.0)
    # Without this, rows that differ only by rounding would count as different.
    floor = 1e-10 * jnp.sum(w * jnp.sum(z * z, 1)) / jnp.maximum(total, 1e-6)
    return jax.lax.stop_gradient(jnp.maximum(jnp.maximum(found, floor), 1e-12))


def _linear(kernel: Callable[..., Array], a: Array, b: Array) -> Float[Array, ""]:
    """Means over disjoint pairs of rows of k(x, x') + k(y, y') - k(x, y') - k(x', y)."""
    n = min(len(a), len(b)) // 2 * 2
    # Rows that count come first, so that the others do not break pairs.
    first, second = (jnp.argsort(w <= 0, stable=True)[:n] for w in (a, b))
    i, j = (first[::2], first[1::2]), (second[::2], second[1::2])
    rowwise = lambda x, y: jnp.sum(jnp.square(x - y), 1)  # noqa: E731
    h = (
        kernel(lambda x, y: (x[i[0]], x[i[1]]), rowwise)
        + kernel(lambda x, y: (y[j[0]], y[j[1]]), rowwise)
        - kernel(lambda x, y: (x[i[0]], y[j[1]]), rowwise)
        - kernel(lambda x, y: (x[i[1]], y[j[0]]), rowwise)
    )
    return mean(h, a[i[0]] * a[i[1]] * b[j[0]] * b[j[1]])


class DAN(DomainLoss):
    """The DAN loss: the sum over layers of their ``mmd`` between source and target rows.

    Attributes:
        on: the outputs to compare; the paper takes the task-specific layers at the top.
        estimator: see ``mmd``.
    """

    on: tuple[str, ...] = struct.field(pytree_node=False, default=("features", "logits"))
    estimator: Estimator = struct.field(pytree_node=False, default="biased")

    def layers(self) -> tuple[str, ...]:
        """Returns ``on``."""
        return self.on

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: a layer or ``batch["domain"]`` is missing.
        """
        values = [
            mmd(*source_and_target(batch, layer(outputs, name)), estimator=self.estimator) for name in self.on
        ]
        return sum(values, jnp.zeros(())), {}
