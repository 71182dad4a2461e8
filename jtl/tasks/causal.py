"""Causal language modelling: the loss of predicting each token from those before it.

Bengio et al. 2003, "A Neural Probabilistic Language Model"; Radford et al. 2018, "Improving Language Understanding by
Generative Pre-Training", equation 1.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean_token_cross_entropy


class CausalLM(Loss):
    """Mean cross-entropy of each next token, in nats: ``token_logits`` at t against ``input_ids`` at t + 1.

    The model may be any that outputs ``token_logits`` (B, L, V) where those at t depend only on tokens up to t (the
    loss cannot check this): Llama, Mistral, Qwen2 and Qwen3 of ``jtl.models``, such as ``jtl.load("smollm2")``, or your
    own by ``jtl.wrap`` or ``jtl.model.linen``. A pair of tokens does not count if either is padding (``attention_mask``
    0) or its row has ``batch["weight"]`` 0. A token id outside the vocabulary makes the loss NaN.

    Attributes:
        mask: name of a batch field (B, L) that is 1 where the next token counts, such as ``continuation`` of
            ``jtl.data.pairs``, to learn answers but not prompts. None: every real token counts.
    """

    mask: str | None = struct.field(pytree_node=False, default=None)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and as metrics ``tokens`` (number of predicted tokens) and ``token_accuracy``.

        Raises:
            KeyError: the model outputs no ``token_logits``, or the batch has no field ``mask``.
            ValueError: ``token_logits`` do not cover every position.
        """
        if "token_logits" not in outputs:
            raise MissingError(f"CausalLM reads output 'token_logits'; the model gives {sorted(outputs)}")
        ids, logits = jnp.asarray(batch["input_ids"]), outputs["token_logits"]
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise InputError(
                f"CausalLM needs token_logits (B, L, V) for input_ids {ids.shape}, got {logits.shape}"
            )
        logits, target = logits[:, :-1], ids[:, 1:]
        weight = jnp.ones(target.shape)
        if "attention_mask" in batch:
            real = jnp.asarray(batch["attention_mask"]) != 0
            weight = (real[:, 1:] & real[:, :-1]).astype(jnp.float32)
        if self.mask is not None:
            if self.mask not in batch:
                raise MissingError(
                    f"CausalLM(mask={self.mask!r}) finds no such field; the batch has {sorted(batch)}"
                )
            weight = weight * jnp.asarray(batch[self.mask])[:, :-1]
        if "weight" in batch:
            weight = weight * jnp.asarray(batch["weight"])[:, None]
        return mean_token_cross_entropy(logits, target, weight)
