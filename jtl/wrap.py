"""Your own model as a ``Model``: a plain function, a Flax NNX module or an Equinox module.

For a Linen module use ``jtl.model.linen``. In each case the parameters become nested dicts with paths, so all rules,
labels, losses and gradients of jtl apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.model import Batch, Mode, Model, Outputs, State, Variables, arguments


def _named(value: Any, returns: str) -> Outputs:
    return dict(value) if isinstance(value, Mapping) else {returns: value}


def _no_taps(mode: Mode, kind: str) -> None:
    if mode.taps:
        raise InputError(
            f"taps {mode.taps} need a Linen module; this model wraps {kind}: return activations in its outputs"
        )


@dataclass(frozen=True)
class Function:
    """A forward that calls ``function(params, ...)``; batch fields become its arguments by name."""

    function: Callable[..., Any]
    returns: str

    @property
    def call(self) -> Callable[..., Any]:
        """The function whose arguments are the batch fields."""
        return self.function

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Call the function."""
        _no_taps(mode, "a plain function")
        inputs = arguments(self.function, batch, getattr(self.function, "__name__", "function"))
        return _named(self.function(variables["params"], **inputs), self.returns), {}


def function(apply: Callable[..., Any], params: PyTree, *, returns: str = "features") -> Model:
    """Return a model of ``apply(params, x, ...)`` and a nested dict of parameters.

    Args:
        apply: a pure function; its arguments after the first are the batch fields of the same names.
        params: nested dicts of arrays.
        returns: name of the output if ``apply`` returns an array and not a dict.

    >>> model = function(lambda params, x: x @ params["w"], {"w": jax.numpy.ones((3, 2))})
    >>> model({"x": jax.numpy.ones((5, 3))})["features"].shape
    (5, 2)
    """
    return Model({"params": params}, Function(apply, returns))


@dataclass(frozen=True)
class _Form:
    """How a pytree converts to nested dicts and back; hashable, so it can be static."""

    structure: Any
    paths: tuple[str, ...]

    @classmethod
    def of(cls, value: PyTree) -> _Form:
        return cls(jax.tree.structure(value), tuple(_flat(value)))

    def rebuild(self, leaves: Mapping[str, Any]) -> PyTree:
        flat = tree.flatten(leaves)
        return jax.tree.unflatten(self.structure, [flat[path] for path in self.paths])


def _flat(value: PyTree) -> dict[str, Any]:
    leaves = tree.flatten(value)
    # An NNX variable is a node around its array; paths leave its "value" out.
    return (
        {p.removesuffix("/value"): leaf for p, leaf in leaves.items()}
        if isinstance(value, nnx.State)
        else leaves
    )


def _dicts(value: PyTree) -> dict[str, Any]:
    return tree.nest(_flat(value))


@dataclass(frozen=True)
class NNX:
    """A forward that rebuilds an NNX module from its graph definition and calls it."""

    graph: Any
    params: _Form
    state: _Form
    rngs: _Form
    call: Callable[..., Any]
    returns: str

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Merge the module, set training or evaluation, call it, and split it again."""
        _no_taps(mode, "an NNX module")
        if mode.train and key is None and self.rngs.paths:
            raise InputError("training an NNX module with random streams needs key=")
        key = jax.random.key(0) if key is None else key
        # A stream is a key and a count; each stream gets its own key.
        streams = {
            path: jax.numpy.uint32(0) if path.endswith("count") else tree.fold_path(key, path)
            for path in self.rngs.paths
        }
        module = nnx.merge(
            self.graph,
            self.params.rebuild(variables["params"]),
            self.rngs.rebuild(streams),
            self.state.rebuild(variables.get("state", {})),
        )
        module.set_attributes(deterministic=not mode.train, raise_if_not_found=False)
        module.set_attributes(use_running_average=mode.stats == "running", raise_if_not_found=False)
        outputs = _named(module(**arguments(self.call, batch, type(module).__name__)), self.returns)
        if mode.stats == "running":
            return outputs, {}
        _, _, _, state = _split(module)
        return outputs, {"state": _dicts(state)}


def _split(module: nnx.Module) -> Any:
    """Graph definition, parameters, random streams, other state."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def from_nnx(module: nnx.Module, *, returns: str = "features") -> Model:
    """Return a model of a Flax NNX module; ``nnx.Param`` leaves are ``params``, other variables collection ``state``.

    Args:
        module: the module.
        returns: name of the output if the module returns an array and not a dict.

    >>> model = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> model(jax.numpy.ones((5, 3)))["features"].shape
    (5, 2)
    """
    graph, params, rngs, state = _split(module)
    forms = _Form.of(params), _Form.of(state), _Form.of(rngs)
    variables = {"params": _dicts(params), **({"state": _dicts(state)} if jax.tree.leaves(state) else {})}
    return Model(variables, NNX(graph, *forms, type(module).__call__, returns))


@dataclass(frozen=True)
class Equinox:
    """A forward that rebuilds an Equinox module and maps it over the rows of a batch."""

    params: _Form
    constants: _Form
    static: tuple[Any, ...]
    structure: Any
    call: Callable[..., Any]
    returns: str

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Combine the module, set inference mode, and ``vmap`` it over rows."""
        import equinox as eqx

        _no_taps(mode, "an Equinox module")
        static = jax.tree.unflatten(self.structure, self.static)
        constants = self.constants.rebuild(variables.get("constants", {}))
        module = eqx.combine(self.params.rebuild(variables["params"]), constants, static)
        module = eqx.nn.inference_mode(module, value=not mode.train)
        inputs = arguments(self.call, batch, type(module).__name__)
        rows = jax.tree.leaves(inputs)[0].shape[0]
        inputs.pop("key", None)
        if key is None:
            return _named(jax.vmap(lambda row: module(**row))(inputs), self.returns), {}
        one = lambda row, row_key: module(**row, key=row_key)  # noqa: E731
        return _named(jax.vmap(one)(inputs, jax.random.split(key, rows)), self.returns), {}


def from_equinox(module: Any, *, returns: str = "features") -> Model:
    """Return a model of an Equinox module that maps *one* example, ``module(x, *, key=None) -> y``.

    Floating-point arrays are ``params``; other arrays are the collection ``constants``.

    Args:
        module: the module.
        returns: name of the output if the module returns an array and not a dict.

    Raises:
        ValueError: the module uses ``eqx.nn.State`` (batch normalisation), which is not supported.
    """
    import equinox as eqx

    params, rest = eqx.partition(module, eqx.is_inexact_array)
    constants, static = eqx.partition(rest, eqx.is_array)
    leaves, structure = jax.tree.flatten(static)
    is_state = lambda node: isinstance(node, eqx.nn.StateIndex)  # noqa: E731
    if any(map(is_state, jax.tree.leaves(module, is_leaf=is_state))):
        raise InputError(
            "an Equinox module with eqx.nn.State is not supported; use a layer without state (GroupNorm, LayerNorm)"
        )
    base = Equinox(
        _Form.of(params), _Form.of(constants), tuple(leaves), structure, type(module).__call__, returns
    )
    collections = {"params": params, **({"constants": constants} if jax.tree.leaves(constants) else {})}
    return Model({name: _dicts(leaves) for name, leaves in collections.items()}, base)
