"""What an adapter is: a few leaves beside a weight W, and the weight that they make of it.

A method is a frozen dataclass with ``init`` and ``weight``; the forward, stacked layers and merging follow
from these two. ``W + A·B`` methods give ``factors`` instead, and get a forward that multiplies by the low-rank
factors and whose gradient is never as large as W.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jtl.adapters.site import Site, SiteError

Leaves = dict[str, Array]
Matrix = Float[Array, "m n"]
Pattern = tuple[tuple[str, Any], ...]  # (regex of module paths, value): the first that matches wins


def at(value: Any, path: str, name: str) -> Any:
    """``value``, or that of the first rule ``(regex, value)`` whose regex matches the whole ``path``.

    Raises ValueError if rules are given and none matches.

    >>> at((("encoder/.*", 4), (".*", 8)), "encoder/query", "rank")
    4
    """
    if not isinstance(value, (tuple, list)):
        return value
    for pattern, own in value:
        if re.fullmatch(pattern, path):
            return own
    raise ValueError(f"{name}: no rule covers {path!r}; end with ('.*', value)")


class Method:
    """Base of the methods; subclasses are frozen dataclasses.

    Attributes:
        kinds: the kinds of layers (``Site.kind``) that the method can adapt.
    """

    kinds: ClassVar[tuple[str, ...]] = ("dense", "conv", "embed")

    @property
    def subtracted(self) -> bool:
        """Whether W gives up, at insertion, what the adapter starts with."""
        return False

    def check(self, site: Site) -> None:
        """Raise SiteError if ``site`` cannot be adapted so."""
        if site.kind not in self.kinds:
            raise SiteError(
                f"{type(self).__name__} cannot adapt {site.path}, a layer of kind {site.kind!r}: "
                f"it supports {', '.join(self.kinds)}"
            )

    def shared(self, sites: tuple[Site, ...], key: Array) -> Leaves:
        """Arrays that all sites share and that never train; each site sees them among its leaves."""
        return {}

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """The leaves of one layer, such that the model computes what it did before."""
        raise TypeError(f"{type(self).__name__} does not define init")

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """W with the adapter in it: what merging writes, and by default what the forward uses."""
        raise TypeError(f"{type(self).__name__} does not define weight")

    def bias(self, site: Site, bias: Float[Array, " n"], leaves: Leaves) -> Float[Array, " n"]:
        """The bias with the adapter in it."""
        return bias


class LowRank(Method):
    """Methods of the form (W + A·B) c: ``factors`` gives A (m, r) and B (r, n), scale included; ``columns`` c (n,)."""

    dropout: float = 0.0

    def factors(self, site: Site, leaves: Leaves) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
        """A and B."""
        raise TypeError(f"{type(self).__name__} does not define factors")

    def columns(self, site: Site, weight: Matrix, leaves: Leaves) -> Float[Array, " n"] | None:
        """A factor for each output, or None for 1."""
        return None

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """(W + A·B) c."""
        a, b = self.factors(site, leaves)
        columns = self.columns(site, weight, leaves)
        whole = weight + (a @ b).astype(weight.dtype)
        return whole if columns is None else whole * columns[None]
