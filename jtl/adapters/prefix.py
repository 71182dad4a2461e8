"""Prefix tuning: trained keys and values in front of those of every attention; the model itself stays frozen.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190; for
text encoders as in Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across
Scales and Tasks", https://arxiv.org/abs/2110.07602. The vectors train directly, without Li and Liang's MLP
reparametrisation. Numerically equal to PEFT's on BERT and RoBERTa.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import tree
from jtl.adapters.prompt import (
    POSITION,
    VECTORS,
    check_length,
    check_met,
    check_new,
    first_position,
    positions,
    probed,
    put_first,
)
from jtl.adapters.site import SiteError, example
from jtl.model import Batch, Forward, Inputs, Linen, Mode, Model, Outputs, State, Variables, modules
from jtl.models.parts.attention import Attention

DEVIATION = 0.02


@dataclass(frozen=True)
class Prefix:
    """The technique behind ``prefix``.

    Attributes:
        name: under which its leaves lie.
        length: of the prefix, p.
        paths: of the attentions.
        first: the first index of the position table that a token uses.
        longest: how many tokens the table has positions for; None for a model without such a table.
    """

    name: str
    length: int
    paths: tuple[str, ...]
    first: int = 0
    longest: int | None = None

    def sites(self) -> tuple[str, ...]:
        """Returns the paths of the layers that carry leaves: each attention's key and value."""
        return tuple(f"{path}/{layer}" for path in self.paths for layer in ("key", "value"))

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` whose attentions also attend to the prefix."""
        paths, sites = frozenset(self.paths), frozenset(self.sites())

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            met: set[str] = set()

            def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
                path = "/".join(context.module.path)
                if context.method_name != "__call__":
                    return call(*args, **kwargs)
                if path in paths:
                    return self._attend(call, *args, **kwargs)
                if path in sites:
                    met.add(path)
                    return put_first(
                        call(*args, **kwargs), context.module.variables["params"][self.name][VECTORS]
                    )
                if path == POSITION and self.longest is not None:
                    met.add(path)
                    return call(self._after(*args))
                return call(*args, **kwargs)

            with nn.intercept_methods(intercept):
                outputs, state = forward(variables, batch, mode, key)
            check_met(self.name, (*self.sites(), *([] if self.longest is None else [POSITION])), met)
            return outputs, state

        return run

    def _attend(
        self,
        call: Callable[..., Any],
        x: Float[Array, "B L D"],
        bias: Float[Array, "... Q K"] | None = None,
        **options: Any,
    ) -> Float[Array, "B L D"]:
        """Attention with p more positions in front, visible to all, whose own outputs are dropped.

        Their queries are wasted: p / L of an attention's own work, but none of the MLP's.
        """
        p = self.length
        if bias is not None:
            queries = 0 if bias.shape[-2] == 1 else p
            bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 2) + [(queries, 0), (p, 0)])
        return call(jnp.pad(x, ((0, 0), (p, 0), (0, 0))), bias, **options)[:, p:]

    def _after(self, ids: Array) -> Array:
        """Position ids of a text that comes after the prefix; padding ids do not shift."""
        assert self.longest is not None
        check_length(self.name, self.length, ids.shape[-1], self.longest)
        return jnp.where(ids >= self.first, ids + self.length, ids)


def prefix(
    model: Model, *, length: int = 20, key: Array, name: str = "prefix", batch: Inputs | None = None
) -> Model:
    """Returns ``model`` with a prefix: in every attention, ``length`` trained keys and values (p, D) before its own.

    Whatever the padding, every position attends to the whole prefix. In text encoders the prefix takes the first p
    positions and the text those after it, as in PEFT. The prefix has no hidden states of its own: all outputs keep
    their shapes, as do taps outside the attentions, and CLS stays CLS.

    A prefix changes the model's outputs from the start; no initial value makes it an identity (even zeros take
    attention away from the text). Insert it after adapters of keys and values: an adapter inserted later would bypass
    it, and the forward raises. Train it with the labels ``jtl.finetune.train_only(model, ".*/prefix/.*|head/.*")``.

    Args:
        model: a transformer of ``jtl.models``, or a Linen model of your own built with its ``Attention``.
        length: p.
        key: for the initial values, normal with deviation 0.02 (PEFT uses 1).
        name: of the adapter and its leaves, ``encoder/layer_0/attention/key/prefix/vectors`` and so on.
        batch: a smallest batch, for a model that is not of ``jtl.models``. Positions shift only if they are embedded
            at ``embeddings/position``.

    Raises:
        SiteError: the model has no such attention.
        ValueError: ``length`` is under 1 or leaves no position for a text; or the model has a prefix. The forward
            raises it for a text too long for the remaining positions.
    """
    if not isinstance(model.base, Linen):
        raise SiteError(
            f"prefix tuning goes into Linen attentions; this model wraps {type(model.base).__name__}"
        )
    check_new(model, Prefix, length)
    batch = example(model) if batch is None else batch
    kinds = modules(model, batch)
    paths = tuple(path for path, kind in kinds.items() if issubclass(kind, Attention))
    if not paths:
        raise SiteError(
            "prefix tuning needs attentions (jtl.models.parts.Attention), as the transformers of jtl.models have; "
            f"this model is {getattr(model.config, 'model_type', type(model.base.module).__name__)}"
        )
    params = tree.flatten(model.params)
    counted = f"{POSITION}/embedding" in params
    places = (first_position(model), positions(model)) if counted else ()
    technique = Prefix(name, length, paths, *places)
    leaves = {}
    for site in technique.sites():
        kernel = params[f"{site}/kernel"]  # (*stack, D, D): scanned layers are stacked in front
        shape = (*kernel.shape[:-2], length, kernel.shape[-1])
        start = jax.random.normal(tree.fold_path(key, site), shape, kernel.dtype)
        leaves[f"{site}/{name}/{VECTORS}"] = DEVIATION * start
    return probed(model.with_technique(technique, tree.nest(leaves)), batch)
