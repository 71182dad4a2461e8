"""What the regularisers towards earlier parameters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jtl import tree
from jtl.errors import InputError


def check_leaves(
    what: str, leaves: Mapping[str, Any], params: Mapping[str, Any], owner: str = "the model"
) -> None:
    """Raise ValueError unless ``params``, those of ``owner``, has each of ``leaves`` in the same shape."""
    for path, leaf in leaves.items():
        if path not in params:
            near = tree.near_misses(path, params)
            raise InputError(f"{what} has {path!r}, which {owner} lacks; near misses: {near}")
        if jnp.shape(leaf) != jnp.shape(params[path]):
            raise InputError(
                f"{what}: {path!r} has shape {jnp.shape(leaf)}, that of {owner} {jnp.shape(params[path])}; "
                "leave new leaves out"
            )
