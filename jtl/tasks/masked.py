"""Masked language modelling: hide words of a text and name them, with BERT's head tied to the word embedding.

Devlin, Chang, Lee, Toutanova: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019, https://arxiv.org/abs/1810.04805, section 3.1 and appendix A.1. The mask is drawn anew at every forward, as in
RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4.1).

It is a technique on the model and a loss: the technique masks the ids that the body reads and gives logits at the
masked positions alone, a seventh of what all would take; the loss compares them with the words that stood there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables, run_linen
from jtl.rows import mean_token_cross_entropy

NAME = "mlm"  # where the head's leaves lie in params
WORDS = "embeddings/word/embedding"  # of BERT, RoBERTa and DistilBERT


class Masked(NamedTuple):
    """Texts with hidden words; see ``mask``.

    Attributes:
        input_ids: what the model reads.
        positions: the chosen positions, K a row.
        target: the ids that stood there.
        weight: 1 for each of them, 0 for the entries that only fill a row up.
    """

    input_ids: Int[Array, "B L"]
    positions: Int[Array, "B K"]
    target: Int[Array, "B K"]
    weight: Float[Array, "B K"]


def mask(
    input_ids: Int[Array | np.ndarray, "B L"],
    attention_mask: Int[Array | np.ndarray, "B L"] | None,
    key: Array,
    *,
    mask_id: int,
    special: tuple[int, ...],
    vocabulary: int,
    rate: float = 0.15,
) -> Masked:
    """Choose ``rate`` of the tokens of each text; 80 % become ``mask_id``, 10 % any id, 10 % stay.

    Of a text's n tokens, neither special nor padding, ``round(rate * n)`` are chosen, at least one if n > 0, as in
    BERT's own code. K is ``ceil(rate * L)``, so the shapes depend on L alone.

    Args:
        input_ids: token ids.
        attention_mask: 0 where a row is padding; None if nothing is.
        key: decides everything.
        mask_id: the id of [MASK].
        special: ids never chosen.
        vocabulary: the number V of ids; the random ones are uniform over all of them.
        rate: share of the tokens to choose, in (0, 1).
    """
    ids = jnp.asarray(input_ids)
    chosen_key, fate_key, word_key = jax.random.split(key, 3)
    plain = ~(ids[..., None] == jnp.asarray(special, ids.dtype)[None, None]).any(-1)
    if attention_mask is not None:
        plain &= jnp.asarray(attention_mask) != 0
    most = math.ceil(rate * ids.shape[1])
    _, positions = jax.lax.top_k(jnp.where(plain, jax.random.uniform(chosen_key, ids.shape), -1.0), most)
    tokens = plain.sum(1)
    count = jnp.minimum(jnp.maximum(jnp.round(rate * tokens), 1), tokens)
    real = jnp.arange(most)[None] < count[:, None]
    target = jnp.take_along_axis(ids, positions, 1)
    fate = jax.random.uniform(fate_key, target.shape)
    word = jax.random.randint(word_key, target.shape, 0, vocabulary, ids.dtype)
    new = jnp.where(fate < 0.8, jnp.asarray(mask_id, ids.dtype), jnp.where(fate < 0.9, word, target))
    hidden = ids.at[jnp.arange(len(ids))[:, None], positions].set(jnp.where(real, new, target))
    return Masked(hidden, positions, target, real.astype(jnp.float32))


class TokenHead(nn.Module):
    """``norm(gelu(dense(x))) @ table.T + bias``: BERT's head over the vocabulary.

    Attributes:
        eps: of the layer norm.
        std: of the initial kernel.
    """

    eps: float = 1e-12
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "B K D"], table: Float[Array, "V D"]) -> Float[Array, "B K V"]:
        """Logits of every word of the ``table`` of embeddings."""
        init = nn.initializers.normal(self.std)
        x = nn.gelu(nn.Dense(x.shape[-1], kernel_init=init, name="dense")(x), approximate=False)
        x = nn.LayerNorm(self.eps, name="norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (len(table),))
        return jnp.einsum("bkd,vd->bkv", x, table) + bias[None, None]


class _At(nn.Module):
    """Runs the head under its name, so that interceptors see the path its leaves have in the model."""

    head: TokenHead

    @nn.compact
    def __call__(self, x: Any, table: Any) -> Any:
        return self.head.clone(parent=self, name=NAME)(x, table)


@dataclass(frozen=True)
class MaskedHead:
    """The technique behind ``masked_head``.

    Attributes:
        module: the head.
        table: path of the word embedding in ``params``: one leaf, which both ends of the model read.
        mask_id: the id of [MASK].
        special: ids never masked.
        rate: share of the tokens to mask.
    """

    module: TokenHead
    table: str
    mask_id: int
    special: tuple[int, ...]
    rate: float
    name: ClassVar[str] = NAME

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` of masked ids, with the head's outputs added."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            table = tree.flatten(variables["params"])[self.table]
            masked, below = None, key
            if key is not None:
                draw, below = jax.random.split(key)
                masked = mask(
                    batch["input_ids"],
                    batch.get("attention_mask"),
                    draw,
                    mask_id=self.mask_id,
                    special=self.special,
                    vocabulary=len(table),
                    rate=self.rate,
                )
                batch = {**batch, "input_ids": masked.input_ids}
            outputs, state = forward(variables, batch, mode, below)
            if "sequence" not in outputs:
                raise MissingError(
                    f"the masked head reads output 'sequence'; the model gives {sorted(outputs)}"
                )
            x, extra = outputs["sequence"], {}
            if masked is not None:
                x = jnp.take_along_axis(x, masked.positions[..., None], 1)
                extra = {"masked": {"target": masked.target, "weight": masked.weight}}
            params = {"params": {NAME: variables["params"][NAME]}}
            new, _ = run_linen(
                _At(self.module), params, {"x": x, "table": table}, Mode(), None, "token_logits"
            )
            return {**outputs, **new, **extra}, state

        return run


def masked_head(
    model: Model,
    tokenizer: Any,
    *,
    key: Array,
    rate: float = 0.15,
    table: str = WORDS,
    params: dict[str, Any] | None = None,
) -> Model:
    """``model`` that names hidden words: a new head under ``params["mlm"]``, whose decoder is the word embedding.

    A forward with a key hides words of ``input_ids`` first: ``token_logits`` (B, K, V) are those of the chosen
    positions, ``masked`` has their ``target`` and ``weight`` (B, K). *Every* output is then one of masked texts, so
    take the head off with ``jtl.remove(model, "mlm")`` before other training. A forward without a key hides nothing and
    gives ``token_logits`` (B, L, V).

    Args:
        model: reads ``input_ids`` and ``attention_mask``, and gives ``sequence`` (B, L, D).
        tokenizer: of the model; its ``mask_token_id`` and ``all_special_ids`` are read.
        key: for the head's initialisation.
        rate: share of the tokens to hide.
        table: path of the word embedding (V, D).
        params: the head's leaves, if it has been trained before.

    Raises:
        ValueError: a rate outside (0, 1), a tokenizer without a mask token, a model that has such a head or has no
            word embedding at ``table``.
    """
    if not 0 < rate < 1:
        raise InputError(f"rate is a share of the tokens, between 0 and 1, got {rate}")
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no mask token: masked language modelling needs a tokenizer whose "
            "mask_token is set; for a causal model take CausalLM"
        )
    if NAME in model.params:
        raise InputError(
            f"the model has leaves under {NAME!r} already: jtl.remove(model, {NAME!r}) takes them off"
        )
    leaves = tree.flatten(model.params)
    if table not in leaves:
        raise InputError(
            f"no word embedding at {table!r}; near misses: {tree.near_misses(table, leaves)}; name it, table=..."
        )
    if tokenizer.mask_token_id >= len(leaves[table]):
        raise InputError(
            f"the mask token is {tokenizer.mask_token_id}, and {table} has {len(leaves[table])} rows: take the model's "
            "own tokenizer, jtl.pretrained.tokenizer(NAME)"
        )
    module = TokenHead(
        getattr(model.config, "layer_norm_eps", 1e-12), getattr(model.config, "initializer_range", 0.02)
    )
    if params is None:
        width = leaves[table].shape[1]
        params = jax.jit(module.init)(key, jnp.zeros((1, 1, width)), leaves[table])["params"]
    special = tuple(sorted(int(i) for i in tokenizer.all_special_ids))
    technique = MaskedHead(module, table, int(tokenizer.mask_token_id), special, rate)
    return model.with_technique(technique, {NAME: params})


class MaskedLM(Loss):
    """Mean cross-entropy of the hidden words under ``token_logits``, in nats, over all of a batch.

    The model is one of ``masked_head``. Rows of ``batch["weight"]`` 0 do not count. To measure without dropout:
    ``loss.value(model, model(batch, key=key), batch, None)``, the same key for every model compared.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and its ``tokens`` (how many were hidden) and ``token_accuracy``.

        Raises KeyError if no word was hidden.
        """
        if "masked" not in outputs:
            raise MissingError(
                "MaskedLM finds no masked words: it needs jtl.tasks.masked_head(model, ...), and a key"
            )
        target, weight = outputs["masked"]["target"], outputs["masked"]["weight"]
        if "weight" in batch:
            weight = weight * batch["weight"][:, None]
        return mean_token_cross_entropy(outputs["token_logits"], target, weight)
