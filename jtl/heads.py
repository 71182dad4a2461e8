"""Task heads: small modules on a model's outputs, with their own leaves under ``params[name]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables, run_linen

ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu, "identity": lambda x: x}


class Classifier(nn.Module):
    """A classification head: ``out(dropout(activation(dense(dropout(x)))))``; ``out(dropout(x))`` without ``hidden``.

    Attributes:
        classes: number of outputs, C.
        hidden: whether a layer ``dense`` (D, W) comes first.
        activation: after ``dense``: ``tanh``, ``relu`` or ``identity``.
        dropout: rate before ``out`` in training.
        input_dropout: rate before ``dense`` in training.
        bias: whether the layers have a bias.
        width: W; None for D.
    """

    classes: int
    hidden: bool = False
    activation: str = "tanh"
    dropout: float = 0.0
    input_dropout: float = 0.0
    bias: bool = True
    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], *, train: bool = False) -> Float[Array, "... C"]:
        """Return the logits."""
        if self.hidden:
            x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
            x = ACTIVATIONS[self.activation](nn.Dense(self.width or x.shape[-1], self.bias, name="dense")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, self.bias, name="out")(x)


class _At(nn.Module):
    """Runs ``module`` under ``at``, so that its leaves, taps and interceptors see its path in the model."""

    module: nn.Module
    at: str

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        return self.module.clone(parent=self, name=self.at)(x, train=train)


@dataclass(frozen=True)
class Head:
    """The technique behind ``attach``: ``outputs[output] = module(outputs[on])``."""

    name: str
    module: nn.Module
    on: str
    output: str

    def wrap(self, forward: Forward) -> Forward:
        """Return ``forward`` with the head's output added."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            below, above = (None, None) if key is None else jax.random.split(key)
            outputs, state = forward(variables, batch, mode, below)
            if self.on not in outputs:
                raise MissingError(
                    f"head {self.name!r} reads output {self.on!r}; the model gives {sorted(outputs)}"
                )
            params = {"params": {self.name: variables["params"][self.name]}}
            new, _ = run_linen(
                _At(self.module, self.name), params, {"x": outputs[self.on]}, mode, above, self.output
            )
            taps = {**outputs.get("taps", {}), **new.pop("taps", {})}
            return {**outputs, **new, **({"taps": taps} if taps else {})}, state

        return run


def attach(
    model: Model,
    module: nn.Module,
    *,
    on: str,
    params: dict[str, Any] | None = None,
    width: int | None = None,
    key: Array | None = None,
    name: str = "head",
    output: str = "logits",
) -> Model:
    """Return ``model`` with ``module`` on its output ``on``; an existing head of that name is replaced with its leaves.

    Args:
        model: any model whose outputs have ``on``: an array (B, D), or whatever the module reads.
        module: a Linen module, ``(x, *, train) -> y``.
        on: the output that the head reads, such as ``"features"`` or ``"pooled"``.
        params: the head's parameters; by default initialised from ``key`` for inputs of size ``width``.
        width: D, the size of the input.
        key: random key for the initialisation.
        name: where the head's leaves are in ``params``.
        output: name of the head's output.

    Raises:
        ValueError: neither ``params`` nor both ``key`` and ``width`` are given, or the module has collections other
            than parameters, such as batch statistics.
    """
    if params is None:
        if key is None or width is None:
            raise InputError(f"attach(name={name!r}) needs params, or key and width to initialise them")
        variables = jax.jit(module.init)(key, jnp.zeros((1, width)))
        if set(variables) != {"params"}:
            raise InputError(
                f"head {name!r} has the collections {sorted(variables)}; it may have parameters alone: use LayerNorm"
            )
        params = variables["params"]
    kept = tuple(t for t in model.techniques if not (isinstance(t, Head) and t.name == name))
    bare = {child: leaves for child, leaves in model.params.items() if child != name}
    return (
        model.with_params(bare)
        .replace(techniques=kept)
        .with_technique(Head(name, module, on, output), {name: params})
    )


def find(model: Model, name: str = "head") -> Head | None:
    """Return the head called ``name``, or None."""
    return next((t for t in model.techniques if isinstance(t, Head) and t.name == name), None)


def classifier(
    model: Model,
    classes: int,
    *,
    key: Array,
    on: str | None = None,
    width: int | None = None,
    dropout: float | None = None,
) -> Model:
    """Return ``model`` with a new classification head in its architecture's standard form: ``logits`` (B, classes).

    A model loaded by jtl knows that form and its dropout (BERT: one linear layer on the tanh pooler), so it can be
    saved as the Hugging Face class of the task. For any other model, name the output ``on`` and its ``width``; the head
    is then linear. An existing head is replaced.

    Args:
        model: any model.
        classes: number of classes.
        key: random key for the initialisation.
        on: the output that the head reads; None for the architecture's standard.
        width: size of that output.
        dropout: rate before the last layer; None for the architecture's own.

    Raises:
        ValueError: fewer than one class, or ``on`` and ``width`` are missing for a model of unknown architecture.
    """
    if classes < 1:
        raise InputError(f"classes must be at least 1, got {classes}")
    spec: Any = getattr(model.config, "head", None)
    if spec is None and (on is None or width is None):
        raise InputError(
            "this model has no standard head: name the output and its size, on='features', width=D"
        )
    if on is None:
        module, on = standard(model.config, classes, dropout), spec.on
    else:
        module = Classifier(classes, dropout=dropout or 0.0)
    return attach(model, module, on=on, width=model.config.width(on) if width is None else width, key=key)


def standard(config: Any, classes: int, dropout: float | None = None) -> Classifier:
    """Return the classification head that ``transformers`` gives the architecture of ``config``.

    Args:
        config: the architecture's configuration.
        classes: number of classes.
        dropout: rate; None for the architecture's own.
    """
    spec = config.head
    rate = config.head_dropout if dropout is None else dropout
    at = {layer: rate if layer in spec.dropout else 0.0 for layer in ("dense", "out")}
    return Classifier(classes, spec.hidden, spec.activation, at["out"], at["dense"], spec.bias, spec.width)
