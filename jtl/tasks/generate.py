"""Generation: a model continues texts, a token at a time, with the keys and values of what it has read.

A causal language model reads the text it continues; a decoder also looks at what its encoder was given, which is
encoded once.

Sampling at a temperature; among the k most likely tokens (Fan et al. 2018, "Hierarchical Neural Story Generation",
https://arxiv.org/abs/1805.04833); among the fewest that hold a share p of the probability (Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl.errors import InputError
from jtl.model import Model
from jtl.tasks.beams import beam_search
from jtl.tasks.decode import Cache, Rule, begin, prompts, read


def generate(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B L"] | None,
    attention_mask: Int[Array | np.ndarray, "B L"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
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
        model: gives ``token_logits``, and its configuration makes a ``cache``, as those of ``jtl.models.llama``,
            ``gpt2``, ``whisper`` and ``t5`` do.
        input_ids: the texts, at least a token each; with ``encoder``, how the decoder's texts begin: None for the
            configuration's ``decoder_start_token_id``.
        attention_mask: 0 at padding, which may stand on either side; None if there is none.
        max_new_tokens: N. Each N, and each shape of ``input_ids``, is a compilation.
        temperature: 0 takes the most likely token; above 0 logits are divided by it and a token is drawn.
        top_k: draw among the k most likely tokens, after ``temperature``.
        top_p: draw among the most likely tokens, as few as have this much probability together, after ``top_k``.
        beams: above 1 the best text of a beam search of that width: see ``jtl.tasks.beam_search``.
        length_penalty: of beams.
        eos_id: the token that ends a text; an ended text repeats it. Once all have ended, the loop stops.
        key: for drawing.
        encoder: the fields of a batch that the encoder reads, such as ``log_mel``. They come with the first forward,
            and the cache keeps what later ones need; the tokens are then ``decoder_input_ids``.
        rule: changes logits (B, V) before a token is chosen, say to minus infinity where it is forbidden, given the
            tokens so far: ``rule(logits, new, i)``, the first i of each row of ``new`` (B, N). Compares by value, or
            each call is a compilation.

    Raises:
        ValueError: a model without a cache, tokens that it does not have, or settings that mean nothing.
    """
    if beams > 1:
        if key is not None or temperature != 0:
            raise InputError("beams search, they draw no tokens: leave out temperature and key")
        found = beam_search(
            model,
            input_ids,
            attention_mask,
            beams=beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            eos_id=eos_id,
            encoder=encoder,
            rule=rule,
        )
        return found.tokens[:, 0]
    ids, mask = prompts(model, input_ids, attention_mask, encoder, max_new_tokens)
    draws = _draws(temperature, top_k, top_p, key)
    settings = _Settings(max_new_tokens, top_k, top_p, eos_id, rule, encoder is not None)
    return _generate(model, ids, mask, draws, None if encoder is None else dict(encoder), settings)


def stream(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B L"] | None,
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
) -> Iterator[Int[np.ndarray, " B"]]:
    """The tokens of ``generate``, those of each step as soon as they are there; it ends when all texts have.

    >>> for text in written(tokenizer, stream(model, **tokens, max_new_tokens=20)):  # doctest: +SKIP
    ...     print(text, end="", flush=True)

    A step is a program of its own, so that a token costs a call more than in ``generate``. Arguments and errors are
    those of ``generate``.
    """
    ids, mask = prompts(model, input_ids, attention_mask, encoder, max_new_tokens)
    draws = _draws(temperature, top_k, top_p, key)
    settings = _Settings(max_new_tokens, top_k, top_p, eos_id, rule, encoder is not None)
    return _stream(model, ids, mask, draws, None if encoder is None else dict(encoder), settings)


def stream_text(tokenizer: Any, tokens: Iterator[Int[np.ndarray, " B"]]) -> Iterator[str]:
    """What each step of ``stream`` adds to the first text; a character of several tokens comes with its last.

    Args:
        tokenizer: has ``decode``.
        tokens: of ``stream``.
    """
    ids: list[int] = []
    text = said = ""
    for step in tokens:
        ids.append(int(step[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
            yield text[len(said) :]
            said = text
    if len(text) > len(said):
        yield text[len(said) :]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is compiled into the programs."""

    length: int
    top_k: int | None
    top_p: float | None
    eos_id: int | None
    rule: Rule | None
    decoder: bool


class _Carry(NamedTuple):
    """Of the loop: how many tokens are written, the last of them, which texts have ended, all of them, the cache."""

    i: Int[Array, ""]
    last: Int[Array, " B"]
    ended: Bool[Array, " B"]
    new: Int[Array, "B N"]
    cache: Cache


def _draws(temperature: float, top_k: int | None, top_p: float | None, key: Array | None) -> Any:
    if temperature < 0 or (temperature > 0) != (key is not None):
        raise InputError(
            f"a temperature above 0 draws tokens and needs a key, 0 draws none: got temperature={temperature}, "
            f"key={key}"
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise InputError("top_k and top_p say among which tokens to draw: they need a temperature above 0")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k is at least 1 and top_p in (0, 1], got top_k={top_k}, top_p={top_p}")
    return None if key is None else (jnp.float32(temperature), key)


@partial(jax.jit, static_argnames="settings")
def _generate(model, ids, mask, draws, encoder, settings: _Settings):
    def going(carry):
        return (carry.i < settings.length) & ~carry.ended.all()

    start = _begin(model, ids, mask, encoder, settings)
    return jax.lax.while_loop(going, lambda carry: _step(model, carry, draws, settings), start).new


def _stream(model, ids, mask, draws, encoder, settings):
    carry = _first(model, ids, mask, encoder, settings)
    for _ in range(settings.length):
        carry = _next(model, carry, draws, settings)
        yield np.asarray(carry.last)
        if settings.eos_id is not None and np.asarray(carry.ended).all():
            return


def _begin(model, ids, mask, encoder, settings: _Settings) -> _Carry:
    last, cache = begin(model, ids, mask, settings.length, encoder)
    fill = 0 if settings.eos_id is None else settings.eos_id
    new = jnp.full((len(ids), settings.length), fill, ids.dtype)
    return _Carry(jnp.int32(0), last, jnp.zeros(len(ids), bool), new, cache)


def _step(model, carry: _Carry, draws, settings: _Settings) -> _Carry:
    i, last, ended, new, cache = carry
    logits, cache = read(model, last, cache, decoder=settings.decoder)
    logits = logits if settings.rule is None else settings.rule(logits, new, i)
    if draws is None:
        token = jnp.argmax(logits, -1).astype(last.dtype)
    else:
        temperature, key = draws
        among = kept(logits / temperature, settings.top_k, settings.top_p)
        token = jax.random.categorical(jax.random.fold_in(key, i), among).astype(last.dtype)
    if settings.eos_id is not None:
        token = jnp.where(ended, settings.eos_id, token)
        ended |= token == settings.eos_id
    return _Carry(i + 1, token, ended, new.at[:, i].set(token), cache)


_first = jax.jit(_begin, static_argnames="settings")
_next = jax.jit(_step, static_argnames="settings", donate_argnames="carry")


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
