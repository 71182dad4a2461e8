"""Beam search: approximately the most probable continuations of a prompt.

Lowerre 1976, "The HARPY Speech Recognition System"; for neural decoders Sutskever et al. 2014, "Sequence to Sequence
Learning with Neural Networks", https://arxiv.org/abs/1409.3215, section 3.2. The choice of candidates, the stopping
rule and the length penalty follow the beam search of ``transformers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl.errors import InputError
from jtl.model import Model
from jtl.tasks.decode import Cache, Rule, begin, prompts, read, take_rows

NEVER = -1e9  # the score of an empty slot


class Beams(NamedTuple):
    """The K texts a search ended with, best first.

    Attributes:
        tokens: generated tokens; after its end a text repeats ``eos_id``.
        scores: sum of the log-probabilities of a text's n tokens, including ``eos_id``, divided by
            ``n^length_penalty``.
    """

    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]


def beam_search(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B L"] | None,
    attention_mask: Int[Array | np.ndarray, "B L"] | None = None,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    eos_id: int | None = None,
    encoder: Mapping[str, Array | np.ndarray] | None = None,
    rule: Rule | None = None,
) -> Beams:
    """Returns the best continuations of each prompt by up to ``max_new_tokens`` = N tokens, in one compiled program.

    Each step extends the ``beams`` = K open texts by one token and keeps the K most probable extensions that do not
    end. An extension that ends and is among the K most probable becomes a candidate for the result. The search for a
    prompt stops after N tokens, where all open texts end, or once K candidates score at least as well as the best open
    text would if it ended there. The latter is a heuristic: with ``length_penalty`` above 0 the score of a longer text
    may still rise.

    Args:
        model: see ``jtl.tasks.generate``.
        input_ids: prompts; see ``jtl.tasks.generate``.
        attention_mask: 0 at padding; see ``jtl.tasks.generate``.
        beams: K.
        max_new_tokens: N.
        length_penalty: exponent of a text's length in its score: above 0 favours long texts, below 0 short ones.
        early_stopping: stop as soon as K candidates are found.
        eos_id: the token that ends a text.
        encoder: see ``jtl.tasks.generate``.
        rule: changes the log-probabilities (B K, V) before extensions are chosen; see ``jtl.tasks.generate``.

    Returns:
        For each prompt K texts and their scores, best first.

    Raises:
        ValueError: as for ``jtl.tasks.generate``; or ``beams`` below 1.
    """
    ids, mask = prompts(model, input_ids, attention_mask, encoder, max_new_tokens)
    if beams < 1:
        raise InputError(f"beams must be at least 1, got {beams}")
    return _search(
        model,
        ids,
        mask,
        jnp.float32(length_penalty),
        None if encoder is None else dict(encoder),
        beams,
        max_new_tokens,
        early_stopping,
        eos_id,
        rule,
    )


class _Carry(NamedTuple):
    """Loop state: K open texts and K candidates a row, best first; ``hopeful`` while an open text may still win."""

    i: Int[Array, ""]
    last: Int[Array, " BK"]
    open: Beams
    found: Beams
    ended: Bool[Array, "B K"]
    hopeful: Bool[Array, "B 1"]
    cache: Cache


@partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _search(model, ids, mask, penalty, encoder, K, N, early, eos_id, rule) -> Beams:
    B = len(ids)
    last, cache = begin(model, ids, mask, N, encoder)
    each = jnp.repeat(jnp.arange(B), K)
    fill = jnp.full((B, K, N), 0 if eos_id is None else eos_id, ids.dtype)
    # All K open texts start equal: without these scores the search would find the same text K times.
    scores = jnp.full((B, K), NEVER).at[:, 0].set(0.0)
    start = _Carry(
        jnp.int32(0),
        last[each],
        Beams(fill, scores),
        Beams(fill, jnp.full((B, K), NEVER)),
        jnp.zeros((B, K), bool),
        jnp.ones((B, 1), bool),
        take_rows(cache, each),
    )

    def going(carry: _Carry):
        on = (carry.i < N) & carry.hopeful.any()
        return on & ~carry.ended.all() if early else on

    def step(carry: _Carry) -> _Carry:
        i, last, texts, found, ended, hopeful, cache = carry
        logits, cache = read(model, last, cache, decoder=encoder is not None)
        log_p = jax.nn.log_softmax(logits)
        if rule is not None:
            log_p = rule(log_p, texts.tokens.reshape(B * K, N), i)
        V = log_p.shape[-1]
        total = (log_p.reshape(B, K, V) + texts.scores[..., None]).reshape(B, K * V)
        # Of 2 K extensions at least K do not end, since each text has one extension by eos_id.
        scores, places = jax.lax.top_k(total, 2 * K)
        beam, token = places // V, (places % V).astype(ids.dtype)
        tokens = _rows(texts.tokens, beam).at[:, :, i].set(token)
        ends = jnp.broadcast_to(i + 1 == N, token.shape)
        ends = ends if eos_id is None else ends | (token == eos_id)

        best, chosen = jax.lax.top_k(jnp.where(ends, NEVER, scores), K)
        rows = (jnp.arange(B)[:, None] * K + _rows(beam, chosen)).ravel()

        length = jnp.float32(i + 1) ** penalty
        new = ends & (jnp.arange(2 * K) < K)[None] & hopeful
        if early:
            new &= ~ended.all(1, keepdims=True)
        pool = jnp.concatenate([found.scores, jnp.where(new, scores / length, NEVER)], 1)
        kept_scores, kept = jax.lax.top_k(pool, K)
        found = Beams(_rows(jnp.concatenate([found.tokens, tokens], 1), kept), kept_scores)
        ended = _rows(jnp.concatenate([ended, new], 1), kept)
        worst = jnp.where(ended, kept_scores[:, -1:], NEVER)
        return _Carry(
            i + 1,
            _rows(token, chosen).ravel(),
            Beams(_rows(tokens, chosen), best),
            found,
            ended,
            hopeful & (best[:, :1] / length > worst).any(1, keepdims=True),
            take_rows(cache, rows, heard=False),
        )

    return jax.lax.while_loop(going, step, start).found


def _rows(x: Array, index: Int[Array, "B M"]) -> Array:
    """``x[b, index[b, m]]``."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)
