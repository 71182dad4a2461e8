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
import jax.numpy as jnp
from jaxtyping import Array

from jtl import tree
from jtl.adapters import forward as forwards
from jtl.adapters.activation import ActivationAdapter
from jtl.adapters.method import Leaves, Method, check_rules
from jtl.adapters.prefix import Prefix
from jtl.adapters.prompt import WORD, Prompt
from jtl.adapters.site import Site, SiteError, find
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class Adapter:
    """The technique behind ``insert``: every site computes with its adapted weight.

    Attributes:
        name: under which its leaves lie.
        method: how they change a weight.
        sites: which weights.
        served: whether its leaves are those of many adapters, each row of a batch having its own (see
            ``jtl.adapters.serve``): then no layer makes W + A·B, which would be one weight for each row.
    """

    name: str
    method: Method
    sites: tuple[Site, ...]
    served: bool = False

    @property
    def changed_base(self) -> bool:
        """Whether the weights of the base are others than before: what its first leaves add was subtracted."""
        return self.method.subtracted

    def place(self, site: Site, leaf: str) -> str:
        """The path of one of its leaves."""
        return place(site, self.name, leaf)

    def bias(self, site: Site) -> str:
        """The path of the bias that belongs to the weight, if there is one."""
        return place(site, "bias")

    def folded(self, params: Mapping[str, Any], shared: Leaves) -> dict[str, Any]:
        """``params`` with the leaves folded into the weights and gone."""
        left = tree.flatten(params)
        for site in self.sites:
            prefix = self.place(site, "")
            own = {
                path.removeprefix(prefix): left.pop(path) for path in list(left) if path.startswith(prefix)
            }
            left[place(site)] = _fold(self.method, site, left[place(site)], own, shared)
            if (path := self.bias(site)) in left:
                left[path] = _fold(self.method, site, left[path], own, shared, "bias")
        return tree.nest(left)

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
                        context.method_name, args, kwargs, train=mode.train, fold=not self.served,
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
        RuleError, SiteError: see ``jtl.adapters.find``, and what the method itself cannot adapt; a rule of the
            method (ranks by layer) meets no layer.
        ValueError: a layer is adapted already: see ``check_free``.
    """
    return insert_adapter(model, Adapter(name, method, find(model, where, batch)), key=key)


def insert_adapter(model: Model, adapter: Adapter, *, key: Array) -> Model:
    """``model`` with ``adapter`` and its first leaves; raises as ``insert`` does."""
    method, sites = adapter.method, adapter.sites
    check_free(model, adapter.name, sites)
    check_rules(method, sites)
    leaves: dict[str, Array] = {}
    params = tree.flatten(model.params)
    for site in sites:
        method.check(site)
        own = _init(method, site, params[place(site)], tree.fold_path(key, site.path))
        leaves |= {adapter.place(site, leaf): value for leaf, value in own.items()}
        if method.subtracted:
            params[place(site)] = 2 * params[place(site)] - _fold(method, site, params[place(site)], own, {})
    if shared := method.shared(sites, key):
        model = model.replace(variables={**model.variables, adapter.name: shared})
    return model.with_params(tree.nest(params)).with_technique(adapter, tree.nest(leaves))


def check_free(model: Model, name: str, sites: tuple[Site, ...]) -> None:
    """Raise if an adapter ``name`` at ``sites`` would leave leaves that nothing reads; all that make an Adapter ask.

    A layer runs as a copy with one adapter in it, which passes by what was put on its activations before.

    Raises:
        ValueError: a layer has another adapter, or an adapter has this name.
        SiteError: an activation adapter, a prefix or a prompt is at such a layer; it goes in last.
    """
    for technique in model.techniques:
        if isinstance(technique, Adapter):
            taken = {place(site) for site in technique.sites}
            both = sorted(site.path for site in sites if place(site) in taken)
            if both or technique.name == name:
                raise InputError(
                    f"{both[0] if both else 'the model'} has the adapter {technique.name!r} already: "
                    "merge it first, or choose other layers and another name"
                )
        elif isinstance(technique, (ActivationAdapter, Prefix, Prompt)):
            if passed_by := sorted({site.path for site in sites} & _changed(technique)):
                raise SiteError(
                    f"{name!r} would take the place of {passed_by[0]}, and nothing would read the leaves of "
                    f"{technique.name!r} there: put {technique.name!r} in last, or choose other layers"
                )


def _changed(technique: ActivationAdapter | Prefix | Prompt) -> set[str]:
    """The paths of the layers whose activations ``technique`` changes."""
    if isinstance(technique, ActivationAdapter):
        return set(technique.paths)
    return set(technique.sites()) if isinstance(technique, Prefix) else {WORD}


def merge(model: Model, name: str | None = None) -> Model:
    """The plain model that computes what the adapted one does: leaves folded into weights, adapter gone.

    Weights are folded in float32 and rounded once. In bfloat16 the two models differ by rounding alone, which is 2**-8
    of each product and sum: tests hold every method's layer to 2**-6 of what it gives with all terms in it replaced by
    their absolute values.

    Args:
        model: with adapters.
        name: of one adapter; left out, all of them.

    Raises ValueError if there is no such adapter, or if the model serves many.
    """
    chosen = [t for t in model.techniques if isinstance(t, Adapter) and name in (None, t.name)]
    if not chosen:
        there = [t.name for t in model.techniques if isinstance(t, Adapter)]
        raise InputError(f"the model has no adapter{'' if name is None else f' {name!r}'}; it has {there}")
    if served := [adapter.name for adapter in chosen if adapter.served]:
        raise InputError(
            f"the model serves many adapters {served[0]!r}: merge one, jtl.adapters.pick(model, i)"
        )
    params = model.params
    for adapter in chosen:
        params = adapter.folded(params, model.variables.get(adapter.name, {}))
    kept = tuple(t for t in model.techniques if t not in chosen)
    names = {adapter.name for adapter in chosen}
    collections = {name: leaves for name, leaves in model.variables.items() if name not in names}
    return model.replace(variables={**collections, "params": params}, techniques=kept)


def place(site: Site, *names: str) -> str:
    """The path of a leaf of ``site``; by default that of its weight."""
    return "/".join((*filter(None, [site.path]), *(names or filter(None, [site.weight]))))


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
        exact, own = jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), (leaf, {**own, **shared})
        )
        if name == "bias":
            new = method.bias(site, exact.ravel(), own)
        else:
            new = method.weight(site, site.matrix(exact), own)
        return new.reshape(leaf.shape).astype(leaf.dtype)

    for _ in site.stack:
        one = jax.vmap(one)
    return one(leaf, own)
