"""Shared parts of all decoding methods: reading a prompt into a cache, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import tree
from jtl.errors import InputError
from jtl.model import Cast, Mode, Model

Cache = dict[str, Any]
Rule = Callable[[Array, Array, Array], Array]


def prompts(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B L"] | None,
    attention_mask: Int[Array | np.ndarray, "B L"] | None,
    encoder: Mapping[str, Any] | None,
    length: int,
) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Validates prompts that are to be continued by ``length`` tokens; returns token ids and attention mask.

    Without ``input_ids``, each row of ``encoder`` starts with the configuration's ``decoder_start_token_id``.

    Raises:
        ValueError: the model has no cache, a token is outside its vocabulary, or the prompts or ``length`` are empty.
    """
    if not hasattr(model.config, "cache"):
        kind = getattr(model.config, "model_type", type(model.base).__name__)
        raise InputError(
            f"generate needs a causal model whose configuration makes a cache, as those of jtl.models.llama do; this "
            f"model is {kind}"
        )
    if input_ids is None:
        start = getattr(model.config, "decoder_start_token_id", None)
        if encoder is None or start is None:
            raise InputError(
                "without input_ids generate needs encoder=, and decoder_start_token_id in the configuration"
            )
        input_ids = np.full((len(next(iter(encoder.values()))), 1), start, np.int32)
    if length < 1 or not input_ids.shape[1]:
        raise InputError(
            f"generate continues texts of a token or more by one or more: got input_ids {input_ids.shape}, "
            f"max_new_tokens={length}"
        )
    side = "" if encoder is None else "decoder_"
    check_ids(input_ids, model.config, f"{side}input_ids")
    if encoder is not None and "input_ids" in encoder:
        check_ids(encoder["input_ids"], model.config)
    ids = jnp.asarray(input_ids)
    return ids, jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)


def begin(
    model: Model,
    ids: Int[Array, "B L"],
    mask: Int[Array, "B L"],
    length: int,
    encoder: Mapping[str, Array] | None,
) -> tuple[Int[Array, " B"], Cache]:
    """Returns the last token of each prompt, and a cache of all tokens before it with room for ``length`` more."""
    # Move all padding to the left, so that each row ends in a token.
    left = jnp.argsort(mask != 0, axis=1, stable=True)
    ids, mask = (jnp.take_along_axis(x, left, 1) for x in (ids, mask))
    B, L = ids.shape
    cache = model.config.cache(B, L - 1 + length, _dtype(model))
    if L > 1 or encoder is not None:  # XLA drops the unused logits, most of a long prompt's memory
        _, cache = _forward(model, ids[:, :-1], mask[:, :-1], cache, encoder is not None, encoder or {})
    return ids[:, -1], cache


def read(
    model: Model, last: Int[Array, " B"], cache: Cache, *, decoder: bool
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more token of each text; returns the next logits in float32, and the cache.

    ``decoder``: whether the model is a decoder behind an encoder.
    """
    logits, cache = _forward(model, last[:, None], jnp.ones((len(last), 1), last.dtype), cache, decoder, {})
    return logits[:, -1].astype(jnp.float32), cache


def _forward(
    model: Model, ids: Array, mask: Array, cache: Cache, decoder: bool, more: Mapping[str, Array]
) -> tuple[Array, Cache]:
    known, side = model.replace(variables={**model.variables, "cache": cache}), "decoder_" if decoder else ""
    outputs, state = known.run({f"{side}input_ids": ids, f"{side}attention_mask": mask, **more}, Mode())
    return outputs["token_logits"], state["cache"]


def take_rows(cache: Cache, rows: Int[Array, " C"], *, heard: bool = True) -> Cache:
    """Returns the cache of the texts at ``rows``; without ``heard``, cross-attention entries stay as they are.

    Keys and values end in the axes rows, heads, length, size; other leaves start with rows, except ``filled``.
    """

    def take(path: str, leaf: Array) -> Array:
        if path == "filled" or ("cross_attention" in path and not heard):
            return leaf
        return jnp.take(leaf, rows, axis=max(leaf.ndim - 4, 0))

    return tree.map_with_path(take, cache)


def _dtype(model: Model) -> Any:
    """The dtype in which the model computes."""
    casts = [technique.dtype for technique in model.techniques if isinstance(technique, Cast)]
    return casts[-1] if casts else jnp.result_type(*jax.tree.leaves(model.params))


def check_ids(ids: Any, config: Any, name: str = "input_ids") -> None:
    """Checks that all token ids lie in the vocabulary, as those of another model's tokenizer may not.

    JAX would look up NaN instead. Traced ids and models without a ``vocab_size`` pass unchecked.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    size = getattr(config, "vocab_size", None)
    if size is None or isinstance(ids, jax.core.Tracer) or not np.size(ids):
        return
    least, most = int(np.min(ids)), int(np.max(ids))
    if not 0 <= least <= most < size:
        raise InputError(
            f"{name} holds the token {most if most >= size else least}, and the model has embeddings of 0 to "
            f"{size - 1}: take the model's own tokenizer, jtl.pretrained.tokenizer(NAME)"
        )
