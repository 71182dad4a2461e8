"""Adapters of activations: small trained networks on the output of a module, with leaves beside that module's own.

Bottleneck adapters: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP",
https://arxiv.org/abs/1902.00751 (after attention and MLP); Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task
Composition for Transfer Learning", https://arxiv.org/abs/2005.00247 (after the MLP alone); in parallel, He et al.
2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", https://arxiv.org/abs/2110.04366. LoReFT: Wu
et al. 2024, "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592, equation 2. They
change no weight, so they cannot be merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl import trace, tree
from jtl.adapters.method import Leaves
from jtl.adapters.site import SiteError, example
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Batch, Forward, Inputs, Mode, Model, Outputs, State, Variables


@runtime_checkable
class Change(Protocol):
    """A frozen dataclass: the leaves for activations of some width, and how they change an activation."""

    def init(self, inputs: int, width: int, key: Array) -> Leaves:
        """Returns the leaves for a module with ``inputs`` input features and ``width`` output features."""
        ...

    def __call__(
        self, leaves: Leaves, x: Float[Array, "*A m"], y: Float[Array, "*B n"]
    ) -> Float[Array, "*B n"]:
        """Returns the new output of a module with input ``x`` and output ``y``."""
        ...


@dataclass(frozen=True)
class ActivationAdapter:
    """The technique: the outputs of the modules at ``paths`` pass through ``change``."""

    name: str
    change: Change
    paths: tuple[str, ...]

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with changed activations."""
        met = frozenset(self.paths)

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
                y = call(*args, **kwargs)
                if context.method_name != "__call__" or "/".join(context.module.path) not in met:
                    return y
                leaves = context.module.variables["params"][self.name]
                return self.change(leaves, jax.tree.leaves((args, kwargs))[0], y).astype(y.dtype)

            with nn.intercept_methods(intercept):
                return forward(variables, batch, mode, key)

        return run


@dataclass(frozen=True)
class Bottleneck:
    """y + scale · up(relu(down(y))), or down(x) when parallel: see ``bottleneck``."""

    width: int = 16
    parallel: bool = False
    scale: float = 1.0

    def init(self, inputs: int, width: int, key: Array) -> Leaves:
        """Down normal with deviation 0.01 (Houlsby et al.), up 0."""
        down = 0.01 * jax.random.normal(key, (inputs if self.parallel else width, self.width))
        return {
            "down": down,
            "down_bias": jnp.zeros(self.width),
            "up": jnp.zeros((self.width, width)),
            "up_bias": jnp.zeros(width),
        }

    def __call__(
        self, leaves: Leaves, x: Float[Array, "*A m"], y: Float[Array, "*B n"]
    ) -> Float[Array, "*B n"]:
        """Returns the changed output."""
        hidden = nn.relu(_affine(x if self.parallel else y, leaves["down"], leaves["down_bias"]))
        return y + self.scale * _affine(hidden, leaves["up"], leaves["up_bias"])


@dataclass(frozen=True)
class LoReFT:
    """y + R^T (W y + b - R y) with orthonormal rows R (r, n): see ``loreft``."""

    rank: int = 4

    def init(self, inputs: int, width: int, key: Array) -> Leaves:
        """R random; W = R and b = 0, so that nothing changes at first."""
        r = jax.random.normal(key, (width, self.rank))
        return {"r": r, "w": orthonormal(r), "b": jnp.zeros(self.rank)}

    def __call__(
        self, leaves: Leaves, x: Float[Array, "*A m"], y: Float[Array, "*B n"]
    ) -> Float[Array, "*B n"]:
        """Returns the changed output."""
        r = orthonormal(leaves["r"])
        return y + (_affine(y, leaves["w"], leaves["b"]) - y @ r) @ r.T


def orthonormal(matrix: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """Returns orthonormal columns with the same span, by QR with a positive diagonal, in float32."""
    q, triangle = jnp.linalg.qr(matrix.astype(jnp.float32))
    return (q * jnp.sign(jnp.diagonal(triangle))[None]).astype(matrix.dtype)


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    y = x @ kernel
    return y + jnp.expand_dims(bias, range(y.ndim - 1))


def bottleneck(
    model: Model,
    *,
    width: int = 16,
    where: str = ".*/mlp",
    parallel: bool = False,
    scale: float = 1.0,
    key: Array,
    name: str = "bottleneck",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with a bottleneck adapter after the modules that ``where`` matches, before the residual sum.

    Args:
        model: a Linen model.
        width: of the bottleneck.
        where: ``.*/mlp`` as in Pfeiffer et al., ``.*/(attention|mlp)`` as in Houlsby et al.
        parallel: read the module's input instead of its output (He et al.).
        scale: multiplies the bottleneck's output.
        key: for the new leaves.
        name: of the adapter and its leaves.
        batch: a smallest batch, for a model that is not of ``jtl.models``.

    Raises:
        RuleError: ``where`` matches no module.
        SiteError: it matches a module that does not return one array.
        ValueError: such a module has leaves called ``name`` already.
    """
    return _insert(model, Bottleneck(width, parallel, scale), where, key, name, batch)


def loreft(
    model: Model,
    *,
    rank: int = 4,
    where: str = ".*/layer_[0-9]+",
    key: Array,
    name: str = "loreft",
    batch: Inputs | None = None,
) -> Model:
    """Returns ``model`` with LoReFT on the outputs of the modules that ``where`` matches, at every position.

    The paper intervenes at some positions of a prompt; for encoders it intervenes at all. ``rank`` is that of R; the
    other arguments and the errors are those of ``bottleneck``.
    """
    return _insert(model, LoReFT(rank), where, key, name, batch)


def _insert(model: Model, change: Any, where: str, key: Array, name: str, batch: Inputs | None) -> Model:
    places = _places(model, example(model) if batch is None else batch)
    met = [path for path in places if re.fullmatch(where, path)]
    if not met:
        close = tree.near_misses(where, places) or list(places)[:3]
        raise tree.RuleError(
            f"where={where!r} meets no module; a rule matches a whole path, such as {', '.join(map(repr, close))}"
        )
    leaves: dict[str, Array] = {}
    for path in met:
        at = places[path]
        if at is None:
            raise SiteError(f"where={where!r} meets {path}, which does not give one array of features")
        prefix = "/".join((*filter(None, [path]), name, ""))
        if there := [leaf for leaf in tree.flatten(model.params) if leaf.startswith(prefix)]:
            raise InputError(
                f"{path} has leaves called {name!r} already, such as {there[0]}: choose another name"
            )
        init, own = partial(change.init, at.inputs, at.width), tree.fold_path(key, path)
        for _ in at.stack:
            init = jax.vmap(init)
        values = init(jax.random.split(own, at.stack) if at.stack else own)
        leaves |= {prefix + leaf: value for leaf, value in values.items()}
    return model.with_technique(ActivationAdapter(name, change, tuple(met)), tree.nest(leaves))


class _Place(NamedTuple):
    """A module's last-axis sizes of input and output, and the axes that scanned layers add."""

    inputs: int
    width: int
    stack: tuple[int, ...]


def _places(model: Model, batch: Inputs) -> dict[str, _Place | None]:
    """The modules by path; None for one that does not return one array."""
    plain = model.replace(techniques=tuple(t for t in model.techniques if isinstance(t, Head)))
    places: dict[str, _Place | None] = {}

    def watcher(module: nn.Module, path: str, x: Any, call: Callable[[], Any]) -> Any:
        y = call()
        one = isinstance(y, jax.Array) and y.ndim > 1 and np.ndim(x) > 1
        # The first call at its path, because the model is a root and so are the heads after it.
        places.setdefault(path, _Place(x.shape[-1], y.shape[-1], _stack(module, whole)) if one else None)
        return y

    whole = tree.flatten(model.params)
    trace.watch(watcher, lambda model, batch: model.run(batch, Mode())[0], plain, batch)
    return places


def _stack(module: Any, whole: Mapping[str, Array]) -> tuple[int, ...]:
    """The axes that scanning adds in front of a module's leaves; its parent's if it has no leaves."""
    while isinstance(module, nn.Module):
        for path, leaf in tree.flatten(module.variables.get("params", {})).items():
            shape = whole["/".join((*module.path, path))].shape
            return shape[: len(shape) - leaf.ndim]
        module = module.parent
    return ()
