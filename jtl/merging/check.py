"""The check that models can be merged: they must have the same leaves."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import PyTree

from jtl import tree
from jtl.errors import InputError


def same(params: Sequence[PyTree]) -> None:
    """Checks that all trees have the same paths, shapes and dtypes.

    Raises:
        ValueError: there are no trees, or they differ; the message names what differs.
    """
    if not params:
        raise InputError("there is nothing to merge: pass at least one tree of parameters")
    for i, other in enumerate(params[1:], 1):
        if lines := tree.diff(params[0], other):
            raise InputError(
                f"only models of the same leaves can be merged; number {i} differs from number 0 in {len(lines)}: "
                f"{'; '.join(lines[:5])}"
            )
