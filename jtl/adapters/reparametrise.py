"""Adapters outside Linen: the forward runs on W with the adapter in it, whatever module W belongs to.

``insert`` knows what a Linen layer does with its weight, and multiplies activations by the small factors. Of a plain
function, an NNX or an Equinox module only the parameters are known, so here W + s A·B is made anew in every forward,
and training takes the gradient of the whole of W: that is the fallback, not the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jaxtyping import Array

from jtl import heads, tree
from jtl.adapters.insert import Adapter, insert_adapter
from jtl.adapters.method import Leaves, LowRank, Method
from jtl.adapters.site import Site, SiteError
from jtl.errors import InputError
from jtl.model import Forward, Linen, Mode, Model, Outputs, State, Variables
from jtl.wrap import NNX, Equinox

IN_OUT, OUT_IN = 0, 1


@dataclass(frozen=True)
class Reparametrised(Adapter):
    """The technique behind ``reparametrise``: an adapter that is merged in every forward.

    A site's ``path`` is that of its leaf. The new leaves lie apart, as two weights may lie in one dict:
    ``lora/layers/0/weight/a``.

    Attributes:
        inputs: the axis of a weight's inputs.
    """

    inputs: int = IN_OUT

    def place(self, site: Site, leaf: str) -> str:
        """The path of one of its leaves."""
        return "/".join((self.name, site.path, leaf))

    def bias(self, site: Site) -> str:
        """The leaf ``bias`` beside the weight."""
        return "/".join((*site.path.split("/")[:-1], "bias"))

    def folded(self, params: Mapping[str, Any], shared: Leaves) -> dict[str, Any]:
        """``params`` with the leaves folded into the weights and gone."""
        return self.turned(super().folded(self.turned(params), shared))

    def turned(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Stored weights (out, in) as (in, out), or back."""
        if self.inputs == IN_OUT:
            return dict(params)
        paths = {site.path for site in self.sites}
        return tree.map_with_path(lambda path, leaf: leaf.T if path in paths else leaf, params)

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` of the merged parameters."""

        def run(variables: Variables, batch: Any, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            params = self.folded(variables["params"], variables.get(self.name, {}))
            return forward({**variables, "params": params}, batch, mode, key)

        return run


def reparametrise(
    model: Model,
    method: Method,
    *,
    where: str,
    key: Array,
    inputs: Literal[0, 1] | None = None,
    name: str = "lora",
) -> Model:
    """``model``, of any kind, with an adapter at every weight that ``where`` meets; it computes what it did before.

    The adapter's leaves lie under ``params[name]``, so it trains by ``train_only(model, "lora/.*|head/.*")``, and
    ``jtl.adapters.merge`` folds it in. Rules in ``method`` (ranks by layer, IA3's feed-forward) see the paths that
    ``where`` sees. A bias is known by its name, ``bias``, beside the weight.

    Args:
        model: of ``jtl.wrap``, or of Linen layers that ``insert`` cannot adapt.
        method: such as ``LoRA(rank=8, alpha=16)``, ``DoRA``, ``VeRA``, ``LoHa``, ``LoKr``, ``IA3``.
        where: a regular expression of *parameter* paths, which must be matrices: ``"layers/[0-9]+/weight"``.
        key: for the new leaves; each draws by its own path.
        inputs: the axis of the weights' inputs: 0 for (in, out), 1 for (out, in). By default 0 for NNX and Linen, 1 for
            Equinox; a plain function must say. An embedding (entries, width) has 0 everywhere.
        name: of the adapter, and of its leaves.

    Raises:
        RuleError: ``where`` meets no parameter.
        SiteError: it meets one that is no matrix; or the method cannot adapt it.
        ValueError: ``inputs`` is not known; the method has dropout, which acts on inputs that are not seen here; the
            parameters are no nested dicts; or a weight is adapted already.

    >>> import jax.numpy as jnp
    >>> from jtl import adapters, wrap
    >>> plain = wrap.function(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))})
    >>> method = adapters.LoRA(rank=1, alpha=1.0)
    >>> model = adapters.reparametrise(plain, method, where="w", inputs=0, key=jax.random.key(0))
    >>> sorted(tree.flatten(model.params))
    ['lora/w/a', 'lora/w/b', 'w']
    """
    if isinstance(method, LowRank) and method.dropout:
        raise InputError(
            f"{type(method).__name__} has dropout {method.dropout} of the layer's input, which a reparametrised weight "
            "does not see: set it to 0"
        )
    structure: Any = jax.tree.structure(model.params)
    if structure != jax.tree.structure(tree.nest(tree.flatten(model.params))):
        raise InputError(
            "the parameters must be nested dicts with names as keys; give the function such a tree"
        )
    axis = _inputs(model, inputs)
    adapter = Reparametrised(name, method, _sites(model, where, axis), inputs=axis)
    _check_biases(adapter, model)
    new = insert_adapter(model.with_params(adapter.turned(model.params)), adapter, key=key)
    return new.with_params(adapter.turned(new.params))


def _inputs(model: Model, inputs: int | None) -> int:
    if inputs is not None:
        return inputs
    if isinstance(model.base, (NNX, Linen)):
        return IN_OUT
    if isinstance(model.base, Equinox):
        return OUT_IN
    raise InputError(
        f"which axis of a weight its inputs lie on is not known for {type(model.base).__name__}: pass inputs=0 for "
        "weights (in, out), 1 for (out, in)"
    )


def _sites(model: Model, where: str, inputs: int) -> tuple[Site, ...]:
    """The matrices that ``where`` meets; those of heads and adapters are no part of the model."""
    apart = {t.name for t in model.techniques if isinstance(t, (heads.Head, Reparametrised))}
    known = {name: leaves for name, leaves in model.params.items() if name not in apart}
    mask, leaves = tree.flatten(tree.matches(where, known)), tree.flatten(known)
    met = {path: leaves[path].shape for path in leaves if mask[path]}
    if wrong := [f"{path} {shape}" for path, shape in met.items() if len(shape) != 2]:
        raise SiteError(
            f"where={where!r} meets parameters that are no matrices: {', '.join(wrong[:5])}; choose those with two axes"
        )
    return tuple(
        Site(path, "dense", "", (shape[inputs], shape[1 - inputs]), shape[inputs])
        for path, shape in met.items()
    )


def _check_biases(adapter: Reparametrised, model: Model) -> None:
    """Raise SiteError if the method changes biases and one cannot be told to be that of one weight."""
    if type(adapter.method).bias is Method.bias:
        return
    params, owner = tree.flatten(model.params), dict[str, str]()
    for site in adapter.sites:
        path = adapter.bias(site)
        if path not in params:
            continue
        if path in owner or params[path].shape != (site.columns,):
            raise SiteError(
                f"{type(adapter.method).__name__} changes the bias of {site.path}, but {path} {params[path].shape} is "
                f"{'that of ' + owner[path] if path in owner else f'not its {site.columns} outputs'}: adapt one of them"
            )
        owner[path] = site.path
