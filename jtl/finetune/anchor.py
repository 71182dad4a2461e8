"""The check that the penalties towards earlier parameters (L2-SP, EWC, SI) share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jtl import tree
from jtl.errors import InputError


def check_leaves(
    what: str, leaves: Mapping[str, Any], params: Mapping[str, Any], owner: str = "the model"
) -> None:
    """Check that ``params`` has each of ``leaves``, in the same shape.

    Args:
        what: the name of ``leaves`` in error messages.
        leaves: the leaves of a penalty, by path.
        params: parameters by path.
        owner: the name of ``params`` in error messages.

    Raises:
        ValueError: a leaf is missing, or its shape differs.
    """
    for path, leaf in leaves.items():
        if path not in params:
            near = tree.near_misses(path, params)
            raise InputError(f"{what} has {path!r}, which {owner} lacks; near misses: {near}")
        if jnp.shape(leaf) != jnp.shape(params[path]):
            raise InputError(
                f"{what}: {path!r} has shape {jnp.shape(leaf)}, that of {owner} {jnp.shape(params[path])}; "
                "leave new leaves out"
            )
