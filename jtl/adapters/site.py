"""Where adapters go: finds the layers of a model that own exactly one weight, by tracing its forward."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from jtl import trace, tree
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Batch, Inputs, Linen, Mode, Model
from jtl.models import ARCHITECTURES

Kind = Literal["dense", "conv", "embed"]
QUERIES_AND_VALUES = (
    ".*/(query|value|query_key_value)"  # in every attention; GPT-2 has one layer for all three
)


class SiteError(InputError):
    """A rule matches a layer that a method cannot adapt."""


@dataclass(frozen=True)
class Site:
    """A layer whose weight every method treats as one matrix W (m, n): m inputs, n outputs.

    The rows of a convolution are its kernel positions times its input channels; those of an embedding are its entries.

    Attributes:
        path: of the module.
        kind: ``dense`` (Dense and DenseGeneral), ``conv`` or ``embed``.
        weight: the name of the weight's leaf.
        shape: of the leaf in one layer.
        rows: m.
        stack: the leading axes of the leaf that scanned layers add.
        groups: feature groups of a convolution; 1 elsewhere.
    """

    path: str
    kind: Kind
    weight: str
    shape: tuple[int, ...]
    rows: int
    stack: tuple[int, ...] = ()
    groups: int = 1

    @property
    def columns(self) -> int:
        """n, the number of outputs."""
        return math.prod(self.shape) // self.rows

    def matrix(self, weight: Array) -> Float[Array, "m n"]:
        """Returns the leaf of one layer as W (m, n)."""
        return weight.reshape(self.rows, self.columns)


def find(model: Model, where: str, batch: Inputs | None = None) -> tuple[Site, ...]:
    """Returns the layers whose whole module path matches ``where``, in the order of the forward.

    Args:
        model: a Linen model, from ``jtl.models`` or your own (``jtl.model.linen``).
        where: a regular expression, such as ``".*/(query|value)"``. Containers and layers without parameters that
            match are skipped.
        batch: a smallest batch to trace your own model with; jtl's own architectures need none.

    Raises:
        RuleError: ``where`` matches no layer; near misses are listed.
        SiteError: it matches a layer with parameters of another kind, or only containers.
        ValueError: the model has an unknown architecture and there is no batch, or it is not a Linen model.
    """
    if not isinstance(model.base, Linen):
        raise InputError(
            f"adapters go into Linen layers, and this model wraps {type(model.base).__name__}: use "
            "jtl.adapters.reparametrise"
        )
    plain = model.replace(techniques=tuple(t for t in model.techniques if isinstance(t, Head)))
    sites, others = _probe(plain, example(model) if batch is None else batch)
    met = [path for path in (*sites, *others) if re.fullmatch(where, path)]
    found = tuple(sites[path] for path in met if path in sites)
    wrong = [f"{path} ({others[path]})" for path in met if others.get(path)]
    if wrong:
        raise SiteError(
            f"where={where!r} meets layers that cannot be adapted: {', '.join(wrong[:5])}; choose Dense, "
            "DenseGeneral, Conv or Embed layers"
        )
    if not met:
        close = tree.near_misses(where, sites) or list(sites)[:3]
        raise tree.RuleError(
            f"where={where!r} meets no layer; a rule matches a whole path, such as {', '.join(map(repr, close))}"
        )
    if not found:
        raise SiteError(f"where={where!r} meets containers alone ({', '.join(met[:3])}): match their layers")
    return found


def example(model: Model) -> Batch:
    """Returns a smallest batch for a model of ``jtl.models``.

    Raises:
        ValueError: the model is not of ``jtl.models``.
    """
    name = getattr(model.config, "model_type", None)
    if name not in ARCHITECTURES:
        raise InputError("this model is not of jtl.models: pass batch=, a smallest batch to trace it with")
    return ARCHITECTURES[name].example(model.config)


def _probe(model: Model, batch: Inputs) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites by path, and the type of the other modules, empty for those without parameters of their own."""
    sites: dict[str, Site] = {}
    others: dict[str, str] = {}

    def watcher(module: nn.Module, path: str, x: Any, call: Callable[[], Any]) -> Any:
        outputs = call()
        leaves = {name: leaf for name, leaf in _params(module).items() if not isinstance(leaf, Mapping)}
        site = _site(module, path, leaves, model.params)
        if site is None:
            others[path] = type(module).__name__ if leaves else ""
        else:
            sites[path] = site
        return outputs

    trace.watch(watcher, lambda model, batch: model.run(batch, Mode())[0], model, batch)
    return sites, others


def _params(module: nn.Module) -> Mapping[str, Any]:
    return module.variables.get("params", {})


def _site(module: nn.Module, path: str, leaves: Mapping[str, Any], params: Any) -> Site | None:
    kind: Kind
    if isinstance(module, nn.Embed):
        kind, weight, axes, groups = "embed", "embedding", 1, 1
    elif isinstance(module, nn.Dense) and module.dot_general is module.dot_general_cls is None:
        kind, weight, axes, groups = "dense", "kernel", 1, 1
    elif isinstance(module, nn.DenseGeneral) and not module.batch_dims and module.dot_general is None:
        kind, weight, groups = "dense", "kernel", 1
        axes = int(np.size(module.axis))
    elif isinstance(module, nn.Conv) and module.conv_general_dilated_cls is None:
        kind, weight, axes, groups = "conv", "kernel", -1, module.feature_group_count
    else:
        return None
    shape = tuple(leaves[weight].shape)
    whole = tree.flatten(params)["/".join((*module.path, weight))].shape
    stack = whole[: len(whole) - len(shape)]
    return Site(path, kind, weight, shape, math.prod(shape[:axes]), stack, groups)
