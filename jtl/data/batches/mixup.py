"""Mixup: convex combinations of a batch's rows, as data augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl.errors import MissingError


def mix(x: Array, share: Array, partner: Array) -> Array:
    """Returns ``λ x_i + (1 - λ) x_π(i)``: each row mixed with its partner's, with one λ for all rows or one per row.

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", https://arxiv.org/abs/1710.09412, equation 1.

    Args:
        x: the rows.
        share: λ, broadcastable to ``x``.
        partner: π(i), the index of each row's partner.
    """
    return share * x + (1 - share) * x[partner]


def mixup(batch: Mapping[str, Any], key: Array, field: str = "image") -> dict[str, Any]:
    """Returns ``batch`` with each row of ``field`` mixed with another's, ``λ x_i + (1 - λ) x_j``, λ uniform in [0, 1].

    This is the augmentation of function matching: Beyer et al. 2022, "Knowledge distillation: A good teacher is patient
    and consistent", https://arxiv.org/abs/2106.05237. Partners j are a random permutation. ``label`` and fields that
    start with ``teacher`` (cached teacher outputs) no longer hold and are left out.

    Args:
        batch: the batch.
        key: for λ and the permutation.
        field: the field to mix.

    Raises:
        KeyError: the batch lacks ``field``.
    """
    if field not in batch:
        raise MissingError(f"mixup mixes batch[{field!r}]; the batch has {sorted(batch)}")
    x = jnp.asarray(batch[field])
    first, second = jax.random.split(key)
    share = jax.random.uniform(first, (len(x),) + (1,) * (x.ndim - 1))
    kept = {
        name: value for name, value in batch.items() if name != "label" and not name.startswith("teacher")
    }
    return {**kept, field: mix(x, share, jax.random.permutation(second, len(x)))}
