"""``Model``: a parameter tree and the pure function that reads it.

A model is a pytree. Its leaves are ``variables`` (``{"params": ..., "batch_stats": ...}``). Everything else is static
and compares by value, so equal models share one compilation. The function is a ``base`` (a Flax Linen module, or a
plain function, NNX or Equinox module through ``jtl.wrap``) under a tuple of ``techniques``, frozen dataclasses whose
``wrap`` turns one forward function into another.

This file is longer than others, because a model, its Linen base and the functions that change any model (``cast``,
``remove``, ``with_config``) are understood together.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.errors import ModifyScopeVariableError
from jaxtyping import Array, PyTree

from jtl import trace, tree
from jtl.errors import InputError, MissingError

Variables = Mapping[str, Any]
Batch = Mapping[str, Any]  # arrays by field, whose first axis is the rows
Inputs = Batch | Array  # what a model is called on: one array is the first argument of its function
Outputs = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """How a forward runs: dropout, normalisation statistics, and the activations to return.

    Attributes:
        train: whether dropout and similar noise is on.
        stats: normalise by the ``"running"`` statistics, or by those of the ``"batch"``, which updates the running
            ones.
        taps: paths of the modules whose outputs to return, such as ``("encoder/layer_3",)``.
    """

    train: bool = False
    stats: Literal["running", "batch"] = "running"
    taps: tuple[str, ...] = ()


Forward = Callable[[Variables, Batch, Mode, Array | None], tuple[Outputs, State]]


@runtime_checkable
class Technique(Protocol):
    """A frozen dataclass in ``Model.techniques`` that changes what the forward computes."""

    def wrap(self, forward: Forward) -> Forward:
        """Return the forward with this technique applied."""
        ...


class Model(struct.PyTreeNode):
    """A function and its variables.

    Attributes:
        variables: collections by name. ``params`` can train; others, such as ``batch_stats``, are updated by forwards.
        base: the innermost forward, ``(variables, batch, mode, key) -> (outputs, state)``; hashable.
        techniques: the techniques that wrap it, innermost first.
        config: the architecture's configuration, if it has one; hashable.
    """

    variables: dict[str, Any]
    base: Forward = struct.field(pytree_node=False)
    techniques: tuple[Technique, ...] = struct.field(pytree_node=False, default=())
    config: Any = struct.field(pytree_node=False, default=None)

    @property
    def params(self) -> dict[str, Any]:
        """The ``params`` collection."""
        return self.variables["params"]

    def with_params(self, params: PyTree) -> Model:
        """Return the model with other parameters."""
        return self.replace(variables={**self.variables, "params": params})

    def with_technique(self, technique: Technique, params: Mapping[str, Any]) -> Model:
        """Return the model with one more technique, whose new leaves are added to ``params``."""
        model = self.with_params(tree.overlay(self.params, params))
        return model.replace(techniques=(*self.techniques, technique))

    def run(self, inputs: Inputs, mode: Mode, key: Array | None = None) -> tuple[Outputs, State]:
        """Run a forward; return its outputs and the collections that it updated.

        ``outputs`` has standard names: ``features`` (B, D), ``sequence`` (B, L, D) or ``map`` (B, H, W, C), ``logits``
        (B, C) with a head, and ``taps`` by path. If ``mode.stats`` is ``"batch"`` the updated collections are all but
        ``params``, else only ``cache``, if the model has one.

        Args:
            inputs: a batch, that is any mapping of arrays by field (also a tokenizer's own), or one array, which
                becomes the first argument of the base function.
            mode: how the forward runs.
            key: random key for dropout and other noise.

        Raises:
            KeyError: the batch lacks a field that the function needs, or no module has a tap's path.
        """
        batch = jax.tree.map(jnp.asarray, dict(fields(self.base, inputs)))
        forward = self.base
        for technique in self.techniques:
            forward = technique.wrap(forward)
        outputs, state = forward(self.variables, batch, mode, key)
        for path in mode.taps:
            if path not in outputs.get("taps", {}):
                raise MissingError(
                    f"no module at tap {path!r}; near misses: {tree.near_misses(path, modules(self, batch))}"
                )
        return outputs, state

    def __call__(
        self,
        inputs: Inputs,
        *,
        train: bool = False,
        stats: Literal["running", "batch"] = "running",
        key: Array | None = None,
        taps: tuple[str, ...] = (),
    ) -> Outputs:
        """Return the outputs of one forward: see ``run`` and ``Mode``."""
        return self.run(inputs, Mode(train, stats, tuple(taps)), key)[0]


@dataclass(frozen=True)
class Linen:
    """A forward that applies a Flax Linen module.

    Batch fields become the arguments of ``module.__call__`` of the same names. Its keywords ``train``,
    ``deterministic`` and ``use_running_average``, where it has them, follow the mode. A module whose normalisation
    contradicts the mode raises.

    Attributes:
        module: the module; Linen modules compare by value.
        returns: name of the output if the module returns an array and not a dict.
    """

    module: nn.Module
    returns: str = "features"

    @property
    def call(self) -> Callable[..., Any]:
        """The function whose arguments are the batch fields."""
        return type(self.module).__call__

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Apply the module."""
        inputs = arguments(self.call, batch, type(self.module).__name__)
        return run_linen(self.module, variables, inputs, mode, key, self.returns)


def linen(module: nn.Module, variables: Mapping[str, Any], *, returns: str = "features") -> Model:
    """Return a model of your own Flax Linen module and its variables.

    Args:
        module: the module.
        variables: as ``module.init`` returns them.
        returns: name of the output if the module returns an array and not a dict.

    >>> module = nn.Dense(2)
    >>> model = linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
    >>> model(jnp.ones((5, 3)))["features"].shape
    (5, 2)
    """
    return Model({name: dict(leaves) for name, leaves in variables.items()}, Linen(module, returns))


_MODES = ("train", "deterministic", "use_running_average")


def arguments(function: Callable[..., Any], batch: Batch, name: str, skip: int = 1) -> dict[str, Any]:
    """Return the fields of ``batch`` that ``function`` takes, by argument name.

    Args:
        function: the function that reads the batch.
        batch: arrays by field.
        name: name of the function for the error message.
        skip: number of leading arguments that are not fields, such as ``self``.

    Raises:
        KeyError: a required argument has no field of its name.
    """
    parameters = _parameters(function, skip)
    required = [p.name for p in parameters if p.default is p.empty]
    missing = [field for field in required if field not in batch]
    if missing:
        raise MissingError(
            f"{name} needs the batch fields {required}; the batch has {sorted(batch)}, so {missing} are missing"
        )
    return {p.name: batch[p.name] for p in parameters if p.name in batch}


def _parameters(function: Callable[..., Any], skip: int = 1) -> list[inspect.Parameter]:
    """The arguments of ``function`` that are batch fields."""
    return [
        p for p in list(inspect.signature(function).parameters.values())[skip:]
        if p.name not in _MODES and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip


def fields(base: Forward, inputs: Inputs) -> Batch:
    """``inputs`` as a batch: one array becomes the field of the first argument of the base's function.

    Raises:
        ValueError: one array, and the base takes a mapping alone.
    """
    if isinstance(inputs, Mapping):
        return inputs
    call = getattr(base, "call", None)
    if call is None:
        raise InputError(
            f"this model ({type(base).__name__}) takes a mapping of arrays by field, not one array"
        )
    return {_parameters(call)[0].name: inputs}


def run_linen(
    module: nn.Module,
    variables: Variables,
    inputs: Mapping[str, Any],
    mode: Mode,
    key: Array | None,
    returns: str,
) -> tuple[Outputs, State]:
    """Apply a Linen module; return its outputs as a dict with taps, and its updated state.

    Args:
        module: the module.
        variables: its variables by collection.
        inputs: its arguments by name.
        mode: how the forward runs.
        key: random key for dropout.
        returns: name of the output if the module returns an array and not a dict.

    Raises:
        ValueError: ``mode.stats`` is ``"batch"`` but the module used its running statistics.
        ModifyScopeVariableError: ``mode.stats`` is ``"running"`` but the module updates its statistics.
    """
    accepted = inspect.signature(type(module).__call__).parameters
    modes = {
        "train": mode.train,
        "deterministic": not mode.train,
        "use_running_average": mode.stats == "running",
    }
    keywords: dict[str, Any] = {name: value for name, value in modes.items() if name in accepted}
    changing = ("cache",) if mode.stats == "running" else (*variables,)
    mutable = [name for name in variables if name in changing and name != "params"]
    taps = frozenset(mode.taps)
    try:
        value, updated = module.apply(
            variables,
            **inputs,
            **keywords,
            rngs=None if key is None else {"dropout": key},
            mutable=[*mutable, "intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and "/".join(m.path) in taps,
        )
    except ModifyScopeVariableError as error:
        error.add_note(
            f"{type(module).__name__} takes batch statistics, but stats='running' was asked for: ask for "
            "stats='batch', or let its __call__ take use_running_average"
        )
        raise
    if "batch_stats" in mutable:
        _check_updated(module, variables["batch_stats"], updated["batch_stats"])
    outputs = dict(value) if isinstance(value, Mapping) else {returns: value}
    calls = {path: _activation(updated.get("intermediates", {}), path) for path in mode.taps}
    found = {path: activation for path, activation in calls.items() if activation is not None}
    if found:
        outputs["taps"] = {**outputs.get("taps", {}), **found}
    return outputs, {name: updated[name] for name in mutable if name in updated}


def _check_updated(module: nn.Module, before: PyTree, after: PyTree) -> None:
    """Raise ValueError if a forward with ``stats="batch"`` returned the very arrays of the running statistics."""
    if all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)):
        raise InputError(
            f"stats='batch' was asked for, but {type(module).__name__} used its running statistics: "
            "let its __call__ take use_running_average"
        )


def _activation(intermediates: Any, path: str) -> Any:
    for name in path.split("/"):
        intermediates = intermediates.get(name, {}) if isinstance(intermediates, Mapping) else {}
    calls = intermediates.get("__call__") if isinstance(intermediates, Mapping) else None
    if calls is None:
        return None
    return calls[0] if len(calls) == 1 else calls


@dataclass(frozen=True)
class Cast:
    """The technique behind ``cast``."""

    dtype: Any
    name: ClassVar[str] = "cast"

    def wrap(self, forward: Forward) -> Forward:
        """Run ``forward`` with parameters and inputs cast to ``dtype``; its outputs are cast back to float32."""

        def cast(values: PyTree, dtype: Any) -> PyTree:
            floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)  # noqa: E731
            return jax.tree.map(lambda x: jnp.asarray(x, dtype) if floating(x) else x, values)

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            low = {**variables, "params": cast(variables["params"], self.dtype)}
            outputs, state = forward(low, cast(batch, self.dtype), mode, key)
            return cast(outputs, jnp.float32), state

        return run


def cast(model: Model, dtype: Any) -> Model:
    """Mixed precision: ``model`` computes in ``dtype`` (such as ``jnp.bfloat16``); its parameters stay float32."""
    return model.replace(techniques=(*model.techniques, Cast(jnp.dtype(dtype))))


def remove(model: Model, name: str) -> Model:
    """Return ``model`` without the techniques called ``name`` and the leaves they added.

    Examples: heads (``"head"``), adapters (``"lora"``), regressors (``"hint"``), the masked-language-model head
    (``"mlm"``), the CRD memory (``"crd"``), moving averages (``"ema"``, ``"teacher"``). Remove what only training needs
    before saving.

    Args:
        model: any model.
        name: of the technique; a regular expression that must match the whole name.

    Raises:
        KeyError: the model has no such technique; the message lists those it has.
        ValueError: the technique changed leaves of the base when it was attached (PiSSA, OLoRA): merge it instead.

    >>> model = linen(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3))))
    >>> remove(cast(model, jnp.bfloat16), "cast") == model
    True
    """
    named = {technique: getattr(technique, "name", "") for technique in model.techniques}
    mine = [technique for technique in model.techniques if re.fullmatch(name, named[technique])]
    if not mine:
        known = [n for n in named.values() if n]
        raise MissingError(
            f"the model has no technique called {name!r}; it has {known or 'none with a name'}"
        )
    for technique in mine:
        if getattr(technique, "changed_base", False):
            raise InputError(
                f"{named[technique]!r} changed the weights that it was put on, so the model without it is another: "
                "fold it in by jtl.adapters.merge"
            )
    gone = {named[technique] for technique in mine}

    def kept(leaves: Mapping[str, Any]) -> dict[str, Any]:
        flat = tree.flatten(leaves)
        rest = {path: leaf for path, leaf in flat.items() if not gone & set(path.split("/"))}
        return dict(leaves) if len(rest) == len(flat) else tree.nest(rest)

    variables = {
        collection: kept(leaves) for collection, leaves in model.variables.items() if collection not in gone
    }
    return model.replace(variables=variables, techniques=tuple(t for t in model.techniques if t not in mine))


def modules(model: Model, batch: Inputs) -> dict[str, type[nn.Module]]:
    """Return the Linen modules that a forward calls, by path: the names that taps and adapters can use.

    The forward is only traced; nothing is computed.
    """
    return trace.modules(lambda model, batch: model.run(batch, Mode())[0], model, batch)


def with_config(model: Model, **changes: Any) -> Model:
    """Return the model with fields of its configuration replaced, in ``model.config`` and in its Linen module.

    The leaves stay as they are: set those of the new configuration with ``with_params``.

    Raises:
        ValueError: the model's base is not a Linen module with a configuration.
        TypeError: the configuration has no such field.

    >>> from jtl.models.mlp import MLP
    >>> with_config(linen(MLP((3,)), {"params": {}}), width=4)
    Traceback (most recent call last):
      ...
    jtl.errors.InputError: the model has no configuration to change: it wraps Linen
    """
    if not isinstance(model.base, Linen) or model.config is None:
        raise InputError(f"the model has no configuration to change: it wraps {type(model.base).__name__}")
    config = replace(model.config, **changes)
    return with_base(model.replace(config=config), module=model.base.module.clone(config=config))


def with_base(model: Model, **changes: Any) -> Model:
    """Return the model with fields of its base replaced (such as ``module=``): another function of the same leaves."""
    return model.replace(base=replace(model.base, **changes))  # type: ignore[type-var]
