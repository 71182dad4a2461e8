"""Put an adapter into a model, and fold it into the weights again.

The new leaves lie beside the weight that they adapt, under the adapter's name:
``encoder/layer_0/attention/query/lora/a``. Flax slices them along with the weight in scanned layers and hands
them to nobody; an interceptor, inside the model's pure function, reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jtl import tree
from jtl.adapters import forward as forwards
from jtl.adapters.method import Leaves, Method
from jtl.adapters.site import Site, find
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class Adapter:
    """The technique behind ``insert``: every site computes with its adapted weight.

    Attributes:
        name: under which its leaves lie.
        method: how they change a weight.
        sites: which weights.
    """

    name: str
    method: Method
    sites: tuple[Site, ...]

    @cached_property
    def _at(self) -> dict[str, Site]:
        return {site.path: site for site in self.sites}

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the adapted layers in place of the plain ones."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            shared = variables.get(self.name, {})
            within: list[str] = []  # the layer whose adapted form is running

            def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
                site = self._at.get("/".join(context.module.path))
                if site is None or within or context.method_name not in ("__call__", "attend"):
                    return call(*args, **kwargs)
                leaves = context.module.variables["params"]
                own = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Mapping)}
                within.append(site.path)
                try:
                    return forwards.run(
                        site, self.method, context.module, own, {**leaves[self.name], **shared},
                        context.method_name, args, kwargs, train=mode.train,
                    )  # fmt: skip
                finally:
                    within.pop()

            # Entered at each trace: interceptors are no part of jit's cache key.
            with nn.intercept_methods(intercept):
                return forward(variables, batch, mode, key)

        return run


def insert(
    model: Model,
    method: Method,
    *,
    where: str,
    key: Array,
    name: str,
    batch: Batch | None = None,
) -> Model:
    """``model`` with an adapter at every layer that ``where`` meets; it computes what it did before.

    What trains is up to the labels: ``jtl.finetune.train_only(model, ".*/lora/.*|head/.*")``.

    Args:
        model: a Linen model.
        method: what the adapter is.
        where: a regular expression of module paths: see ``jtl.adapters.find``.
        key: for the new leaves; each draws by its own path.
        name: of the adapter, and of its leaves.
        batch: a smallest batch, for a model that is not of ``jtl.models``.

    Raises:
        RuleError, SiteError: see ``jtl.adapters.find``, and what the method itself cannot adapt.
        ValueError: a layer is adapted already; merge first.
    """
    sites = find(model, where, batch)
    for technique in model.techniques:
        if isinstance(technique, Adapter):
            both = sorted({site.path for site in sites} & {site.path for site in technique.sites})
            if both or technique.name == name:
                raise ValueError(
                    f"{both[0] if both else 'the model'} has the adapter {technique.name!r} already: "
                    "merge it first, or choose other layers and another name"
                )
    leaves: dict[str, Array] = {}
    params = tree.flatten(model.params)
    for site in sites:
        method.check(site)
        own = _init(method, site, params[place(site)], tree.fold_path(key, site.path))
        leaves |= {place(site, name, leaf): value for leaf, value in own.items()}
        if method.subtracted:
            params[place(site)] = 2 * params[place(site)] - _fold(method, site, params[place(site)], own, {})
    if shared := method.shared(sites, key):
        model = model.replace(variables={**model.variables, name: shared})
    adapter = Adapter(name, method, sites)
    return model.with_params(tree.nest(params)).with_technique(adapter, tree.nest(leaves))


def merge(model: Model, name: str | None = None) -> Model:
    """The plain model that computes what the adapted one does: leaves folded into weights, adapter gone.

    Args:
        model: with adapters.
        name: of one adapter; left out, all of them.

    Raises ValueError if there is no such adapter.
    """
    chosen = [t for t in model.techniques if isinstance(t, Adapter) and name in (None, t.name)]
    if not chosen:
        there = [t.name for t in model.techniques if isinstance(t, Adapter)]
        raise ValueError(f"the model has no adapter{'' if name is None else f' {name!r}'}; it has {there}")
    params = tree.flatten(model.params)
    for adapter in chosen:
        shared = model.variables.get(adapter.name, {})
        for site in adapter.sites:
            prefix = place(site, adapter.name, "")
            mine = [path for path in params if path.startswith(prefix)]
            own = {path.removeprefix(prefix): params.pop(path) for path in mine}
            for leaf in (site.weight, "bias"):
                if (path := place(site, leaf)) in params:
                    params[path] = _fold(adapter.method, site, params[path], own, shared, leaf)
    kept = tuple(t for t in model.techniques if t not in chosen)
    names = {adapter.name for adapter in chosen}
    collections = {name: leaves for name, leaves in model.variables.items() if name not in names}
    return model.replace(variables={**collections, "params": tree.nest(params)}, techniques=kept)


def place(site: Site, *names: str) -> str:
    """The path of a leaf of ``site``; by default that of its weight."""
    return "/".join((*filter(None, [site.path]), *(names or (site.weight,))))


@partial(jax.jit, static_argnums=(0, 1))
def _init(method: Method, site: Site, weight: Array, key: Array) -> dict[str, Array]:
    """New leaves, stacked as the weight is."""
    init = lambda weight, key: method.init(site, site.matrix(weight), key)  # noqa: E731
    for _ in site.stack:
        init = jax.vmap(init)
    return init(weight, jax.random.split(key, site.stack) if site.stack else key)


@partial(jax.jit, static_argnums=(0, 1, 5))
def _fold(
    method: Method, site: Site, leaf: Array, own: Leaves, shared: Leaves, name: str | None = None
) -> Array:
    """The weight (or the leaf ``name``) with the adapter in it, in every layer of a stack."""

    def one(leaf: Array, own: Leaves) -> Array:
        own = {**own, **shared}
        if name == "bias":
            return method.bias(site, leaf.ravel(), own).reshape(leaf.shape)
        return method.weight(site, site.matrix(leaf), own).reshape(leaf.shape)

    for _ in site.stack:
        one = jax.vmap(one)
    return one(leaf, own)
