"""Extractive question answering: which span of a text answers a question.

Devlin, Chang, Lee, Toutanova: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019, https://arxiv.org/abs/1810.04805, section 4.2: a token is the answer's first with the probability softmax(S · T)
over all tokens, and its last with softmax(E · T).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import heads, rows
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs

OUTPUT = "span_logits"


def span_head(model: Model, *, key: Array, width: int | None = None) -> Model:
    """``model`` with the vectors S and E, a linear layer on each token: ``span_logits`` (B, L, 2).

    BERT, RoBERTa and DistilBERT with it can be saved as ``...ForQuestionAnswering`` of ``transformers``. A head that is
    there is replaced.

    Args:
        model: gives ``sequence`` (B, L, D).
        key: for the initialisation.
        width: D, for a model that does not know it.

    Raises ValueError if the width is missing.
    """
    if width is None:
        if not hasattr(model.config, "width"):
            raise InputError("this model does not know the size of its sequence: name it, width=D")
        width = model.config.width("sequence")
    return heads.attach(model, heads.Classifier(2), on="sequence", width=width, key=key, output=OUTPUT)


class Spans(Loss):
    """Mean of the cross-entropies of the answers' first and last tokens, in nats.

    ``span_logits`` (B, L, 2) against ``start`` and ``end`` (B,). The softmax is over the tokens that are no padding, so
    that the padded length changes nothing; ``transformers`` takes all L. Rows of ``batch["weight"]`` 0 do not count. A
    position that is none of the row's tokens makes the loss NaN.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and ``span_accuracy``, the share of rows whose likeliest first and last tokens are both right.

        Raises KeyError if the model has no head for spans.
        """
        log_p = log_probabilities(outputs, batch)
        target = jnp.stack([jnp.asarray(batch[name]) for name in ("start", "end")], 1)
        weight = rows.weights(batch, len(target))
        said = jnp.take_along_axis(log_p, target[:, None], 1, mode="fill", fill_value=jnp.nan)[:, 0]
        known = (target >= 0) & jnp.isfinite(said)
        losses = jnp.where(known, -said, jnp.nan).mean(1)
        hits = (jnp.argmax(log_p, 1) == target).all(1)
        return rows.mean(losses, weight), {"span_accuracy": rows.mean(hits, weight)}


class Found(NamedTuple):
    """The best span of each window.

    Attributes:
        start: its first token.
        end: its last token.
        log_probability: of both, under softmaxes over all tokens of the window; comparable between windows.
    """

    start: Int[Array | np.ndarray, " B"]
    end: Int[Array | np.ndarray, " B"]
    log_probability: Float[Array | np.ndarray, " B"]


def log_probabilities(outputs: Outputs, batch: Batch) -> Float[Array, "B L 2"]:
    """Log-probabilities of each token as the first and as the last of the answer; minus infinity at padding."""
    if OUTPUT not in outputs:
        raise MissingError(
            f"no output {OUTPUT!r}, which jtl.tasks.span_head(model, key=) adds; the model gives {sorted(outputs)}"
        )
    logits = outputs[OUTPUT].astype(jnp.float32)
    if "attention_mask" in batch:
        real = jnp.asarray(batch["attention_mask"]) != 0
        logits = jnp.where(real[..., None], logits, -jnp.inf)
    return jax.nn.log_softmax(logits, 1)


def best_spans(
    log_p: Float[Array, "B L 2"], inside: Int[Array | np.ndarray, "B L"], longest: int = 30
) -> Found:
    """The likeliest spans of 1 to ``longest`` tokens that lie inside the context (Devlin et al. 2019, section 4.2).

    >>> log_p = jnp.log(jnp.array([[[0.1, 0.6], [0.2, 0.1], [0.6, 0.1], [0.1, 0.2]]]))
    >>> found = best_spans(log_p, jnp.ones((1, 4), int))  # the likeliest last token comes before the likeliest first
    >>> found.start.tolist(), found.end.tolist()
    ([2], [3])

    Args:
        log_p: of ``log_probabilities``; any scores of first and last tokens.
        inside: not 0 at tokens of the context.
        longest: span allowed, in tokens.
    """
    L = log_p.shape[1]
    scores = log_p[:, :, None, 0] + log_p[:, None, :, 1]
    length = jnp.arange(L)[None] - jnp.arange(L)[:, None]
    allowed = jnp.asarray(inside) != 0
    valid = allowed[:, :, None] & allowed[:, None, :] & ((length >= 0) & (length < longest))[None]
    flat = jnp.where(valid, scores, -jnp.inf).reshape(len(log_p), L * L)
    best = jnp.argmax(flat, 1)
    return Found(best // L, best % L, jnp.take_along_axis(flat, best[:, None], 1)[:, 0])


@partial(jax.jit, static_argnames="longest")
def _find(model: Model, batch: Batch, longest: int) -> Found:
    return best_spans(log_probabilities(model(batch), batch), batch["inside"], longest)


def find_spans(model: Model, batches: Iterable[Any], *, longest: int = 30) -> Found:
    """The best span of each window, in the order of their ``index``; rows of ``weight`` 0 are dropped.

    Args:
        model: with a ``span_head``.
        batches: with ``inside`` and ``index``, as ``jtl.data.windows.encode`` and ``Batches`` make them.
        longest: span allowed, in tokens.
    """
    parts, index = [], []
    for batch in batches:
        real = np.asarray(batch["weight"]) > 0
        parts.append([np.asarray(field)[real] for field in _find(model, batch, longest)])
        index.append(np.asarray(batch["index"])[real])
    order = np.argsort(np.concatenate(index))
    return Found(*(np.concatenate(own)[order] for own in zip(*parts, strict=True)))
