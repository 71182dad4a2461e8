"""Function matching: Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.

arXiv:2106.05237. Teacher and student see the *same* crop and the same mixup, for very many steps, and the loss is
``SoftTargets`` alone. In jtl both read one batch, so a crop by the loader is the same for both; ``mixup`` makes a
batch of mixed images. Teacher logits cannot be cached then, as each step's images are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl.errors import MissingError


def mixup(batch: Mapping[str, Any], key: Array, field: str = "image") -> dict[str, Any]:
    """``batch`` with each row of ``field`` mixed with another row's, ``λ · x_i + (1 - λ) · x_j``, λ uniform in [0, 1].

    The partner j is a random permutation's. The field ``label`` no longer holds and is left out, like the columns of
    a cached teacher.

    Raises KeyError if the batch lacks ``field``.
    """
    if field not in batch:
        raise MissingError(f"mixup mixes batch[{field!r}]; the batch has {sorted(batch)}")
    x = jnp.asarray(batch[field])
    first, second = jax.random.split(key)
    share = jax.random.uniform(first, (len(x),) + (1,) * (x.ndim - 1))
    mixed = share * x + (1 - share) * x[jax.random.permutation(second, len(x))]
    kept = {
        name: value for name, value in batch.items() if name != "label" and not name.startswith("teacher")
    }
    return {**kept, field: mixed}
