"""Extractive question answering: find the span of a context that answers a question.

Devlin, Chang, Lee, Toutanova 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
https://arxiv.org/abs/1810.04805, section 4.2. The probability that a token starts the answer is softmax(S · T) over all
tokens, and that it ends the answer softmax(E · T).
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
    """Returns ``model`` with a span head, the vectors S and E: a linear layer on each token, ``span_logits`` (B, L, 2).

    BERT, RoBERTa and DistilBERT with it can be saved as ``...ForQuestionAnswering`` of ``transformers``. It replaces an
    existing span head.

    Args:
        model: outputs ``sequence`` (B, L, D).
        key: for the initialisation.
        width: D, for a model whose configuration does not know it.

    Raises:
        ValueError: the width is unknown.
    """
    if width is None:
        if not hasattr(model.config, "width"):
            raise InputError("this model does not know the size of its sequence: name it, width=D")
        width = model.config.width("sequence")
    return heads.attach(model, heads.Classifier(2), on="sequence", width=width, key=key, output=OUTPUT)


class Spans(Loss):
    """Mean of the cross-entropies of the answers' first and last tokens, in nats.

    ``span_logits`` (B, L, 2) against ``start`` and ``end`` (B,). The softmax excludes padding, so the padded length has
    no influence (``transformers`` includes all L). Rows of ``batch["weight"]`` 0 do not count. A position that is not
    one of the row's tokens makes the loss NaN.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and as metric ``span_accuracy``.

        This is the share of rows whose most probable first and last tokens are both right.

        Raises:
            KeyError: the model has no span head.
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
        log_probability: of start and end together, each under a softmax over the window's tokens; comparable between
            windows.
    """

    start: Int[Array | np.ndarray, " B"]
    end: Int[Array | np.ndarray, " B"]
    log_probability: Float[Array | np.ndarray, " B"]


def log_probabilities(outputs: Outputs, batch: Batch) -> Float[Array, "B L 2"]:
    """Returns the log-probabilities of each token as first and last of the answer; minus infinity at padding."""
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
    """Returns the most probable spans of 1 to ``longest`` tokens inside the context (Devlin et al. 2019, section 4.2).

    Args:
        log_p: of ``log_probabilities``, or any scores of first and last tokens.
        inside: nonzero at tokens of the context.
        longest: maximum length of a span in tokens.

    >>> log_p = jnp.log(jnp.array([[[0.1, 0.6], [0.2, 0.1], [0.6, 0.1], [0.1, 0.2]]]))
    >>> found = best_spans(log_p, jnp.ones((1, 4), int))  # the most probable end precedes the most probable start
    >>> found.start.tolist(), found.end.tolist()
    ([2], [3])
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
    """Returns the best span of each window, ordered by ``index``; rows of ``weight`` 0 are dropped.

    Args:
        model: with a ``span_head``.
        batches: with ``inside`` and ``index``, as made by ``jtl.data.windows.encode`` and ``jtl.data.loader.Batches``.
        longest: maximum length of a span in tokens.
    """
    parts, index = [], []
    for batch in batches:
        real = np.asarray(batch["weight"]) > 0
        parts.append([np.asarray(field)[real] for field in _find(model, batch, longest)])
        index.append(np.asarray(batch["index"])[real])
    order = np.argsort(np.concatenate(index))
    return Found(*(np.concatenate(own)[order] for own in zip(*parts, strict=True)))
