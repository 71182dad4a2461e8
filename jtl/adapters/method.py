"""The interface of adapter methods: a few leaves beside a weight W, and the weight they turn it into.

A method is a frozen dataclass with ``init`` and ``weight``; the forward, stacked layers and merging follow from these
two. Methods of the form ``W + A·B`` define ``factors`` instead, and methods that scale W define ``rows`` or
``columns``. The forward of those multiplies activations by the factors, so no gradient is as large as W.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jtl import tree
from jtl.adapters.site import Site, SiteError
from jtl.errors import InputError

Leaves = dict[str, Array]
Matrix = Float[Array, "m n"]
Pattern = tuple[tuple[str, Any], ...]  # (regex of module paths, value): the first that matches wins


def at(value: Any, path: str, name: str) -> Any:
    """Returns ``value``, or the value of the first rule ``(regex, value)`` whose regex matches the whole ``path``.

    Args:
        value: one value, or a sequence of rules.
        path: a module path.
        name: of the value, for messages.

    Raises:
        ValueError: there are rules and none matches.

    >>> at((("encoder/.*", 4), (".*", 8)), "encoder/query", "rank")
    4
    """
    if not isinstance(value, (tuple, list)):
        return value
    for pattern, own in value:
        if re.fullmatch(pattern, path):
            return own
    raise InputError(f"{name}: no rule covers {path!r}; end with ('.*', value)")


def check_rules(method: Method, sites: tuple[Site, ...]) -> None:
    """Checks the rules of ``method`` against ``sites``.

    Raises:
        RuleError: a rule matches no layer or is hidden by earlier ones, or a layer has no rule.
    """
    for name in method.ruled:
        value = getattr(method, name, None)
        if isinstance(value, (tuple, list)):
            try:
                tree.assign(value, {site.path: name for site in sites})
            except tree.RuleError as error:
                raise tree.RuleError(f"{name}, by the paths of the adapted layers: {error}") from None


class Method:
    """Base of the methods; subclasses are frozen dataclasses.

    Attributes:
        kinds: the kinds of layers (``Site.kind``) that the method can adapt.
        ruled: its fields that may be rules of module paths (see ``at``); insertion checks them.
    """

    kinds: ClassVar[tuple[str, ...]] = ("dense", "conv", "embed")
    ruled: ClassVar[tuple[str, ...]] = ("rank", "alpha")

    @property
    def subtracted(self) -> bool:
        """Whether insertion subtracts from W what the initial leaves add."""
        return False

    def check(self, site: Site) -> None:
        """Checks that the method can adapt ``site``.

        Raises:
            SiteError: it cannot.
        """
        if site.kind not in self.kinds:
            raise SiteError(
                f"{type(self).__name__} cannot adapt {site.path}, a layer of kind {site.kind!r}: "
                f"it supports {', '.join(self.kinds)}"
            )

    def shared(self, sites: tuple[Site, ...], key: Array) -> Leaves:
        """Returns arrays that all sites share and that never train; each site sees them among its leaves."""
        return {}

    def init(self, site: Site, weight: Matrix, key: Array) -> Leaves:
        """Returns the initial leaves of one layer, such that the model's outputs do not change."""
        raise TypeError(f"{type(self).__name__} does not define init")

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """Returns W with the adapter in it: what merging writes and, by default, what the forward uses."""
        raise TypeError(f"{type(self).__name__} does not define weight")

    def bias(self, site: Site, bias: Float[Array, " n"], leaves: Leaves) -> Float[Array, " n"]:
        """Returns the bias with the adapter in it."""
        return bias


class Scaling(Method):
    """Base of methods of the form diag(r) W diag(c): the forward scales a layer's inputs and outputs, never W."""

    def rows(self, site: Site, leaves: Leaves) -> Float[Array, " m"] | None:
        """Returns r, a factor for each input, or None for 1."""
        return None

    def columns(self, site: Site, weight: Matrix, leaves: Leaves) -> Float[Array, " n"] | None:
        """Returns c, a factor for each output, or None for 1."""
        return None

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """Returns diag(r) W diag(c)."""
        rows, columns = self.rows(site, leaves), self.columns(site, weight, leaves)
        scaled = weight if rows is None else weight * rows[:, None]
        return (scaled if columns is None else scaled * columns[None]).astype(weight.dtype)


class LowRank(Scaling):
    """Base of methods of the form (W + A·B) diag(c): ``factors`` returns A (m, r) and B (r, n), including the scale."""

    dropout: float = 0.0

    def factors(self, site: Site, leaves: Leaves) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
        """Returns A and B."""
        raise TypeError(f"{type(self).__name__} does not define factors")

    def weight(self, site: Site, weight: Matrix, leaves: Leaves) -> Matrix:
        """Returns (W + A·B) diag(c)."""
        a, b = self.factors(site, leaves)
        columns = self.columns(site, weight, leaves)
        whole = weight + (a @ b).astype(weight.dtype)
        return whole if columns is None else (whole * columns[None]).astype(weight.dtype)
