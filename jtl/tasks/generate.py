"""Generation: a model continues texts, a token at a time, with the keys and values of what it has read.

A causal language model reads the text it continues; a decoder also looks at what its encoder was given, which is
encoded once.

Sampling at a temperature; among the k most likely tokens (Fan et al. 2018, "Hierarchical Neural Story Generation",
https://arxiv.org/abs/1805.04833); among the fewest that hold a share p of the probability (Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.model import Cast, Mode, Model

Rule = Callable[[Array, Array, Array], Array]


def generate(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B L"],
    attention_mask: Int[Array | np.ndarray, "B L"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: Array | None = None,
    encoder: Mapping[str, Array | np.ndarray] | None = None,
    rule: Rule | None = None,
) -> Int[Array, "B N"]:
    """The ``max_new_tokens`` = N tokens that follow each text; the prompt and its continuation are one program.

    >>> tokens = tokenizer(texts, padding=True, return_tensors="np")  # doctest: +SKIP
    >>> new = generate(model, **tokens, max_new_tokens=20, eos_id=tokenizer.eos_token_id)  # doctest: +SKIP
    >>> tokenizer.batch_decode(new, skip_special_tokens=True)  # doctest: +SKIP

    Args:
        model: gives ``token_logits``, and its configuration makes a ``cache``, as those of ``jtl.models.llama`` and
            ``jtl.models.whisper`` do.
        input_ids: the texts, at least a token each; with ``encoder``, how the decoder's texts begin.
        attention_mask: 0 at padding, which may stand on either side; None if there is none.
        max_new_tokens: N. Each N, and each shape of ``input_ids``, is a compilation.
        temperature: 0 takes the most likely token; above 0 logits are divided by it and a token is drawn.
        top_k: draw among the k most likely tokens, after ``temperature``.
        top_p: draw among the most likely tokens, as few as have this much probability together, after ``top_k``.
        eos_id: the token that ends a text; an ended text repeats it. Once all have ended, the loop stops.
        key: for drawing.
        encoder: the fields of a batch that the encoder reads, such as ``log_mel``. They come with the first forward,
            and the cache keeps what later ones need; the tokens are then ``decoder_input_ids``.
        rule: changes logits (B, V) before a token is chosen, say to minus infinity where it is forbidden, given the
            tokens so far: ``rule(logits, new, i)``, the first i of each row of ``new`` (B, N). Compares by value, or
            each call is a compilation.

    Raises:
        ValueError: a model without a cache, or settings that mean nothing.
    """
    if not hasattr(model.config, "cache"):
        kind = getattr(model.config, "model_type", type(model.base).__name__)
        raise ValueError(
            f"generate needs a causal model whose configuration makes a cache, as those of jtl.models.llama do; this "
            f"model is {kind}"
        )
    if max_new_tokens < 1 or not input_ids.shape[1]:
        raise ValueError(
            f"generate continues texts of a token or more by one or more: got input_ids {input_ids.shape}, "
            f"max_new_tokens={max_new_tokens}"
        )
    if temperature < 0 or (temperature > 0) != (key is not None):
        raise ValueError(
            f"a temperature above 0 draws tokens and needs a key, 0 draws none: got temperature={temperature}, "
            f"key={key}"
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p say among which tokens to draw: they need a temperature above 0")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k is at least 1 and top_p in (0, 1], got top_k={top_k}, top_p={top_p}")
    ids = jnp.asarray(input_ids)
    mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
    draws = None if key is None else (jnp.float32(temperature), key)
    heard = None if encoder is None else dict(encoder)
    return _generate(model, ids, mask, draws, max_new_tokens, top_k, top_p, eos_id, heard, rule)


@partial(jax.jit, static_argnums=(4, 5, 6, 7, 9))
def _generate(model, ids, mask, draws, length, top_k, top_p, eos_id, encoder=None, rule=None):
    B, L = ids.shape
    left = jnp.argsort(
        mask != 0, axis=1, stable=True
    )  # all padding to the left, so that each row ends in a token
    ids, mask = (jnp.take_along_axis(x, left, 1) for x in (ids, mask))
    cache = model.config.cache(B, L - 1 + length, _dtype(model))

    side = "" if encoder is None else "decoder_"

    def read(ids, mask, cache, more=None):
        known = model.replace(variables={**model.variables, "cache": cache})
        batch = {f"{side}input_ids": ids, f"{side}attention_mask": mask, **(more or {})}
        outputs, state = known.run(batch, Mode())
        return outputs["token_logits"], state["cache"]

    if L > 1 or encoder is not None:  # XLA drops the logits, which are most of what a long prompt would take
        _, cache = read(ids[:, :-1], mask[:, :-1], cache, encoder)

    def going(carry):
        i, _, ended, _, _ = carry
        return (i < length) & ~ended.all()

    def step(carry):
        i, last, ended, new, cache = carry
        logits, cache = read(last[:, None], jnp.ones((B, 1), mask.dtype), cache)
        logits = logits[:, -1].astype(jnp.float32)
        logits = logits if rule is None else rule(logits, new, i)
        token = _next(logits, i, draws, top_k, top_p).astype(ids.dtype)
        if eos_id is not None:
            token = jnp.where(ended, eos_id, token)
            ended |= token == eos_id
        return i + 1, token, ended, new.at[:, i].set(token), cache

    new = jnp.full((B, length), 0 if eos_id is None else eos_id, ids.dtype)
    start = (jnp.int32(0), ids[:, -1], jnp.zeros(B, bool), new, cache)
    return jax.lax.while_loop(going, step, start)[3]


def _next(logits: Float[Array, "B V"], i, draws, top_k: int | None, top_p: float | None) -> Int[Array, " B"]:
    if draws is None:
        return jnp.argmax(logits, -1)
    temperature, key = draws
    return jax.random.categorical(jax.random.fold_in(key, i), kept(logits / temperature, top_k, top_p))


def kept(
    logits: Float[Array, "B V"], top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "B V"]:
    """``logits``, with minus infinity at what neither filter keeps; tokens as likely as the last kept are kept.

    >>> jnp.isfinite(kept(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=0.6)).tolist()
    [[True, True, False]]
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, -1, descending=True)
        shares = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(shares, -1) - shares
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _dtype(model: Model):
    """The type that the model computes in."""
    casts = [technique.dtype for technique in model.techniques if isinstance(technique, Cast)]
    return casts[-1] if casts else jnp.result_type(*jax.tree.leaves(model.params))
