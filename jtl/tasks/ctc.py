"""Connectionist temporal classification (CTC), for speech recognition without alignments: loss, head, decoding.

Graves et al. 2006, "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural
Networks", https://www.cs.toronto.edu/~graves/icml_2006.pdf. The probability of a text is the sum over all its
alignments to the frames, with repeats and blanks.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jtl import rows
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs, with_config


class CTC(Loss):
    """Negative log-probability of ``labels`` given ``token_logits`` (B, S, V), in nats per label, averaged over rows.

    Equals ``torch.nn.functional.ctc_loss`` with ``reduction="mean"``. Frames where the model's output ``sequence_mask``
    is 0 are padding, and so are labels below 0, which must come last. Rows of ``batch["weight"]`` 0 do not count. The
    loss is infinite for a row with too few frames (one per label, and a blank between equal neighbours), and NaN for a
    label outside the vocabulary.

    Attributes:
        blank: id of the blank token: ``config.pad_token_id`` of Wav2Vec2 and HuBERT.
    """

    blank: int = struct.field(pytree_node=False, default=0)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and the number of ``labels`` as a metric.

        Raises:
            KeyError: the model outputs no ``token_logits``.
        """
        if "token_logits" not in outputs:
            raise MissingError(
                f"CTC reads output 'token_logits', which jtl.tasks.ctc.head adds; the model gives {sorted(outputs)}"
            )
        logits, labels = outputs["token_logits"].astype(jnp.float32), jnp.asarray(batch["labels"])
        mask = outputs["sequence_mask"] if "sequence_mask" in outputs else jnp.ones(logits.shape[:2], bool)
        real = labels >= 0
        known = (labels < logits.shape[-1]).all(1)
        safe = jnp.where(real, labels, 0)
        repeats = (safe[:, 1:] == safe[:, :-1]) & real[:, 1:]
        count = real.sum(1)
        possible = mask.sum(1) >= count + repeats.sum(1)
        losses = optax.ctc_loss(logits, 1.0 - mask, safe, 1.0 - real, blank_id=self.blank)
        losses = jnp.where(known, jnp.where(possible, losses / jnp.maximum(count, 1), jnp.inf), jnp.nan)
        weight = rows.weights(batch, len(labels))
        return rows.mean(losses, weight), {"labels": jnp.sum(weight * count)}


def decode(
    logits: Float[np.ndarray | Array, "B S V"],
    mask: Bool[np.ndarray | Array, "B S"] | None = None,
    *,
    blank: int = 0,
) -> list[list[int]]:
    """Greedy decoding: the labels of the most probable alignment, with repeats merged and blanks removed.

    Args:
        logits: the model's ``token_logits``.
        mask: the model's ``sequence_mask``; None if all frames are real.
        blank: id of the blank token.

    >>> decode(np.eye(3)[[[1, 1, 0, 1, 2, 2]]])
    [[1, 1, 2]]
    """
    best = np.asarray(logits).argmax(-1)
    new = np.concatenate([np.ones_like(best[:, :1], bool), best[:, 1:] != best[:, :-1]], 1)
    kept = new & (best != blank) & (np.ones_like(new) if mask is None else np.asarray(mask) != 0)
    return [row[keep].tolist() for row, keep in zip(best, kept, strict=True)]


def head(model: Model, labels: int, *, key: Array) -> Model:
    """Returns a Wav2Vec2 or HuBERT with a new output layer over ``labels`` tokens, the blank among them.

    It replaces an existing CTC head.

    Raises:
        ValueError: the model's configuration has no ``ctc``.
    """
    _check(model)
    new = nn.Dense(labels, kernel_init=nn.initializers.normal(model.config.initializer_range))
    leaves = jax.jit(new.init)(key, jnp.zeros((1, model.config.width("sequence"))))["params"]
    params = {**model.params, "lm_head": leaves}
    return with_config(model.with_params(params), ctc=True, vocab_size=labels)


def without_head(model: Model) -> Model:
    """Returns a Wav2Vec2 or HuBERT without its CTC head, to attach another head to and to save with it.

    Raises:
        ValueError: the model's configuration has no ``ctc``.
    """
    _check(model)
    params = {name: leaves for name, leaves in model.params.items() if name != "lm_head"}
    return with_config(model.with_params(params), ctc=False)


def _check(model: Model) -> None:
    if not hasattr(model.config, "ctc"):
        kind = getattr(model.config, "model_type", type(model.base).__name__)
        raise InputError(f"only Wav2Vec2 and HuBERT of jtl.models have a head for CTC; this model is {kind}")
