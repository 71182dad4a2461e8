"""Sequence to sequence: training a decoder to write an answer to a text or sound, with teacher forcing.

Sutskever, Vinyals, Le 2014, "Sequence to Sequence Learning with Neural Networks", https://arxiv.org/abs/1409.3215,
section 2. In training each token is predicted from the preceding reference tokens (Williams and Zipser 1989, "A
Learning Algorithm for Continually Running Fully Recurrent Neural Networks", section 3: teacher forcing).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean_token_cross_entropy

IGNORED = -100  # label of a token that does not count, as in torch


def teacher_forcing(
    answers: Int[Array | np.ndarray, "B L"],
    mask: Int[Array | np.ndarray, "B L"] | None = None,
    *,
    start_id: int,
) -> dict[str, Int[Array, "B L"]]:
    """Returns the decoder's inputs and targets, as batch fields for ``Seq2Seq``.

    ``labels`` are the answers, with -100 at padding; ``decoder_input_ids`` are the answers shifted right by one, after
    ``start_id``; ``decoder_attention_mask`` is 1 where these are real. Padding on either side is moved to the end.

    Args:
        answers: token ids of each answer, with its end token but without a start token. Whisper's tokenizer adds a
            start token: leave it out by ``ids[:, 1:]``.
        mask: 0 at padding; None if there is none.
        start_id: ``model.config.decoder_start_token_id``.

    >>> fields = teacher_forcing(jnp.array([[5, 6, 1], [7, 1, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]]), start_id=0)
    >>> fields["decoder_input_ids"].tolist(), fields["labels"].tolist()
    ([[0, 5, 6], [0, 7, 1]], [[5, 6, 1], [7, 1, -100]])
    """
    ids = jnp.asarray(answers)
    real = jnp.ones_like(ids) if mask is None else (jnp.asarray(mask) != 0).astype(ids.dtype)
    right = jnp.argsort(real == 0, axis=1, stable=True)
    ids, real = (jnp.take_along_axis(x, right, 1) for x in (ids, real))
    before = jnp.full_like(ids[:, :1], start_id)
    return {
        "labels": jnp.where(real != 0, ids, IGNORED),
        "decoder_input_ids": jnp.concatenate([before, ids[:, :-1]], 1),
        "decoder_attention_mask": jnp.concatenate([jnp.ones_like(before), real[:, :-1]], 1),
    }


class Seq2Seq(Loss):
    """Mean cross-entropy of each answer token, in nats: ``token_logits`` against ``labels``, both at t.

    The model outputs the ``token_logits`` (B, L, V) of ``decoder_input_ids`` (B, L): T5 and Whisper of ``jtl.models``,
    or your own. ``teacher_forcing`` makes the fields. Labels of -100 and rows of ``batch["weight"]`` 0 do not count;
    any other label outside the vocabulary makes the loss NaN.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and as metrics ``tokens`` (number of predicted tokens) and ``token_accuracy``.

        Raises:
            KeyError: the batch has no ``labels``, or the model outputs no ``token_logits``.
            ValueError: ``token_logits`` do not cover every label.
        """
        if "labels" not in batch:
            raise MissingError(
                "Seq2Seq reads the batch's field 'labels', which jtl.tasks.teacher_forcing makes; the batch has "
                f"{sorted(batch)}"
            )
        if "token_logits" not in outputs:
            raise MissingError(f"Seq2Seq reads output 'token_logits'; the model gives {sorted(outputs)}")
        labels, logits = jnp.asarray(batch["labels"]), outputs["token_logits"]
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise InputError(
                f"Seq2Seq needs token_logits (B, L, V) for labels {labels.shape}, got {logits.shape}"
            )
        weight = (labels != IGNORED).astype(jnp.float32)
        if "weight" in batch:
            weight = weight * jnp.asarray(batch["weight"])[:, None]
        return mean_token_cross_entropy(logits, labels, weight)
