"""Prompt tuning: trained vectors in front of a text's word embeddings; the model itself stays frozen.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
https://arxiv.org/abs/2104.08691. Numerically equal to PEFT's on BERT, RoBERTa and DistilBERT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import tree
from jtl.adapters.site import SiteError, example
from jtl.errors import InputError
from jtl.model import Batch, Forward, Inputs, Mode, Model, Outputs, State, Variables
from jtl.models import ARCHITECTURES
from jtl.models.parts.layers import mean_over

WORD, POSITION, ENCODER = "embeddings/word", "embeddings/position", "encoder"
VECTORS = "vectors"


@dataclass(frozen=True)
class Prompt:
    """The technique behind ``prompt``.

    Attributes:
        name: under which its leaves lie.
        length: of the prompt, p.
        pooled: the part whose first position the output ``pooled`` reads.
        first: the first index of the position table that a token uses; as a token id, it is not padding.
        longest: how many tokens the table has positions for.
    """

    name: str
    length: int
    pooled: Literal["prompt", "text"]
    first: int
    longest: int

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` on the text behind the prompt; its outputs are those of the text."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            met: set[str] = set()

            def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
                path = "/".join(context.module.path)
                if context.method_name != "__call__":
                    return call(*args, **kwargs)
                if not path and "input_ids" in kwargs:  # the model; heads and detached layers are roots too
                    return self._behind(call, kwargs)
                y = call(*args, **kwargs)
                if path == WORD:
                    met.add(path)
                    return put_first(y, context.module.variables["params"][self.name][VECTORS])
                if path == ENCODER and self.pooled == "text":
                    return jnp.roll(
                        y, -self.length, axis=1
                    )  # the text first, because its first token is pooled
                return y

            with nn.intercept_methods(intercept):
                outputs, state = forward(variables, batch, mode, key)
            check_met(self.name, (WORD,), met)
            return outputs, state

        return run

    def _behind(self, call: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
        """Runs the model on fields lengthened by the prompt's positions, which the outputs then drop."""
        p, mask = self.length, fields.get("attention_mask")
        L = fields["input_ids"].shape[1]
        check_length(self.name, p, L, self.longest)
        # Placeholders at the prompt: any token but padding (RoBERTa gives padding no position); attended to; type 0.
        filler = {"input_ids": self.first, "attention_mask": 1, "token_type_ids": 0}
        longer = {
            name: jnp.pad(value, ((0, 0), (p, 0)), constant_values=filler[name])
            if name in filler and value is not None
            else value
            for name, value in fields.items()
        }
        outputs = call(**longer)
        sequence = outputs["sequence"][:, :L] if self.pooled == "text" else outputs["sequence"][:, p:]
        return {**outputs, "sequence": sequence, "features": mean_over(sequence, mask)}


def prompt(
    model: Model,
    *,
    length: int = 20,
    ids: Sequence[int] | None = None,
    pooled: Literal["prompt", "text"] = "prompt",
    key: Array,
    name: str = "prompt",
) -> Model:
    """Returns ``model`` with a prompt: ``length`` trained vectors (p, D) in front of the word embeddings of every text.

    The prompt takes the first p positions and token type 0; the text takes the positions after it. Whatever the
    padding, every text attends to the whole prompt. ``sequence`` (B, L, D) has only the text's positions, and
    ``features`` is their mean over the attention mask. ``pooled``, which the standard heads read, comes from the very
    first position, as in PEFT: that is the prompt's, not CLS. With ``pooled="text"`` it stays CLS, which PEFT cannot
    do. Taps inside the model have p + L positions.

    A prompt changes the model's outputs from the start; no initial value makes it an identity. Insert it after
    adapters of the word embeddings: an adapter inserted later would bypass it, and the forward raises. Train it with
    the labels ``jtl.finetune.train_only(model, ".*/prompt/.*|head/.*")``.

    Args:
        model: a BERT, RoBERTa or DistilBERT of ``jtl.models``.
        length: p.
        ids: tokens of a text whose embeddings initialise the prompt, cut or repeated to p as PEFT does; by default p
            random entries of the vocabulary (the paper draws from its 5,000 most frequent).
        pooled: what ``pooled`` reads: the first position of the ``prompt`` or of the ``text``.
        key: for the random entries.
        name: of the adapter and its leaf, ``embeddings/word/prompt/vectors``.

    Raises:
        SiteError: the model has no embeddings of words and positions, or is not of ``jtl.models``.
        ValueError: ``length`` is under 1 or leaves no position for a text; ``ids`` is empty or outside the vocabulary;
            or the model has a prompt. The forward raises it for a text too long for the remaining positions.
    """
    params = tree.flatten(model.params)
    if not is_text(model):
        raise SiteError(
            f"prompt tuning needs word embeddings at {WORD!r}, and positions at {POSITION!r}, as BERT, RoBERTa and "
            f"DistilBERT of jtl.models have; this model is "
            f"{getattr(model.config, 'model_type', type(model.base).__name__)}"
        )
    check_new(model, Prompt, length)
    words = params[f"{WORD}/embedding"]
    if ids is None:
        rows = jax.random.randint(tree.fold_path(key, WORD), (length,), 0, len(words))
    else:
        if not len(ids) or min(ids) < 0 or max(ids) >= len(words):
            raise InputError(f"ids must be some of the vocabulary's tokens, 0 to {len(words) - 1}, got {ids}")
        rows = jnp.asarray(np.resize(np.asarray(ids), length))
    technique = Prompt(name, length, pooled, first_position(model), positions(model))
    new = model.with_technique(technique, tree.nest({f"{WORD}/{name}/{VECTORS}": words[rows]}))
    return probed(new, example(model))


def put_first(y: Array, vectors: Array) -> Array:
    """Returns ``y`` (B, K, D) with ``vectors`` (p, D) in its first p positions.

    >>> put_first(jnp.zeros((1, 3, 1)), jnp.ones((2, 1))).ravel().tolist()
    [1.0, 1.0, 0.0]
    """
    return y.at[:, : len(vectors)].set(vectors.astype(y.dtype)[None])


def is_text(model: Model) -> bool:
    """Whether this is one of jtl's text encoders: it embeds words and positions."""
    known = getattr(model.config, "model_type", None) in ARCHITECTURES
    return known and {f"{WORD}/embedding", f"{POSITION}/embedding"} <= set(tree.flatten(model.params))


def first_position(model: Model) -> int:
    """The position of a text's first token: RoBERTa starts counting after its padding id."""
    return getattr(model.config, "pad_token_id", -1) + 1


def positions(model: Model) -> int:
    """How many tokens the model's position embeddings have a row for."""
    return len(tree.flatten(model.params)[f"{POSITION}/embedding"]) - first_position(model)


def check_new(model: Model, kind: type, length: int) -> None:
    """Checks the length, and that the model has no technique of this kind yet.

    Raises:
        ValueError: the length is under 1, or the model has such a technique.
    """
    name = kind.__name__.lower()
    if length < 1:
        raise InputError(f"{name}: length must be at least 1, got {length}")
    if there := [t.name for t in model.techniques if isinstance(t, kind)]:  # type: ignore[attr-defined]
        raise InputError(f"the model has the {name} {there[0]!r} already; it can have one")


def check_length(name: str, length: int, text: int, longest: int) -> None:
    """Checks that prompt (or prefix) and text together fit the model's positions.

    Raises:
        ValueError: they have more tokens than the model has positions.
    """
    if length + text > longest:
        raise InputError(
            f"{name} of length {length} and texts of length {text} need {length + text} positions; the model has "
            f"{longest}: cut texts to {max(longest - length, 0)} tokens or choose a shorter {name}"
        )


def check_met(name: str, paths: Sequence[str], met: set[str]) -> None:
    """Checks that a forward called every module of ``paths``, so that no leaf trains without being read.

    Raises:
        SiteError: the forward skipped a module.
    """
    if missed := [path for path in paths if path not in met]:
        raise SiteError(
            f"nothing read the leaves of {name!r} at {', '.join(missed[:3])}: the forward does not call the module, or "
            f"an adapter that was put in later took its place; put {name!r} in last"
        )


def probed(model: Model, batch: Inputs) -> Model:
    """Returns ``model`` after a trace has shown that it runs on ``batch``."""
    jax.eval_shape(lambda model, batch: model.run(batch, Mode())[0], model, batch)
    return model
