"""T5: an encoder-decoder transformer for text, with relative positions.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
https://arxiv.org/abs/1910.10683, section 2.1, with RMSNorm (https://arxiv.org/abs/1910.07467) and, in T5 1.1 and
Flan-T5 (https://arxiv.org/abs/2210.11416), gated MLPs (https://arxiv.org/abs/2002.05202). Numerically equal to
``T5ForConditionalGeneration`` of ``transformers``, also for texts padded on either side.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl.errors import InputError
from jtl.models.architecture import Architecture, Tensor, linear
from jtl.models.parts import cache, scan
from jtl.models.parts.attention import attend, bias_where
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, activation, dense, mean_over
from jtl.models.t5_config import T5Config

Texts = Int[Array | np.ndarray, "B S"]  # input of the encoder


def buckets(count: int, furthest: int) -> Int[np.ndarray, " n"]:
    """Return the bucket, of ``count``, of each distance from 0 to ``furthest``; larger distances share the last one.

    Half of the buckets hold one distance each, the others logarithmically more.

    >>> buckets(8, 20).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7]
    """
    exact, distance = count // 2, np.arange(furthest + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    share = ratio / np.float32(np.log(furthest / exact)) * np.float32(count - exact)
    far = np.minimum(exact + share.astype(np.int32), count - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


class Positions(nn.Module):
    """Relative position bias: a number for each head and distance of two tokens, added to the logits: (1, H, L, T).

    A decoder only looks back; an encoder uses half of its buckets for each direction.
    """

    config: T5Config
    both: bool

    @nn.compact
    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " T"]) -> Float[Array, "1 H L T"]:
        """Look up."""
        c = self.config
        count, furthest = c.relative_attention_num_buckets, c.relative_attention_max_distance
        own = count // 2 if self.both else count
        ahead = keys[None] - queries[:, None]
        distance = jnp.abs(ahead) if self.both else jnp.maximum(-ahead, 0)
        bucket = jnp.asarray(buckets(own, furthest))[jnp.minimum(distance, furthest)]
        bucket += own * (self.both & (ahead > 0))
        init = nn.initializers.normal(c.initializer_factor * c.d_model**-0.5)
        return nn.Embed(count, c.num_heads, embedding_init=init, name="distance")(bucket).transpose(2, 0, 1)[
            None
        ]


class Attention(nn.Module):
    """Multi-head attention with unscaled logits, to itself or to the encoder's output: (B, L, D) to (B, L, D).

    With a ``cache``, keys and values of ``memory`` are kept for forwards without it; those of x are written at
    ``start``.
    """

    config: T5Config
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "#B #H #L T"] | None,
        memory: Float[Array, "B S D"] | None = None,
        start: Int[Array, ""] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """Attend; ``bias`` is added to the logits."""
        c, (B, L, D) = self.config, x.shape
        inner, std = c.num_heads * c.d_kv, c.initializer_factor * c.d_model**-0.5

        def heads(name, source, std):
            return dense(inner, name, std, bias=False)(source).reshape(B, -1, c.num_heads, c.d_kv)

        q_BxLxHxE = heads("query", x, std * c.d_kv**-0.5)
        source = memory if self.cross else x
        if source is None:
            k_BxTxHxE = cache.recalled(self, "keys", x.dtype)
            v_BxTxHxE = cache.recalled(self, "values", x.dtype)
        else:
            k_BxTxHxE = cache.remembered(self, "keys", heads("key", source, std), start)
            v_BxTxHxE = cache.remembered(self, "values", heads("value", source, std), start)
        q, k, v = (t.transpose(0, 2, 1, 3) for t in (q_BxLxHxE, k_BxTxHxE, v_BxTxHxE))
        y_BxHxLxE = attend(q, k, v, bias, partial(Dropout(c.dropout_rate), train=train))
        y = y_BxHxLxE.transpose(0, 2, 1, 3).reshape(B, L, inner)
        return dense(D, "output", c.initializer_factor * inner**-0.5, bias=False)(y)


class Mlp(nn.Module):
    """Two layers with an activation between them, optionally gated: (B, L, D) to (B, L, D)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *, train: bool = False) -> Float[Array, "B L D"]:
        """Apply the layers."""
        c = self.config
        wide = partial(dense, c.d_ff, std=c.initializer_factor * c.d_model**-0.5, bias=False)
        h = activation(c.activation)(wide("gate" if c.gated else "intermediate")(x))
        h = h * wide("intermediate")(x) if c.gated else h
        h = Dropout(c.dropout_rate)(h, train=train)
        return dense(c.d_model, "output", c.initializer_factor * c.d_ff**-0.5, bias=False)(h)


class Layer(nn.Module):
    """Attention, cross-attention (in the decoder), then MLP; each reads the normalised input and is added to it."""

    config: T5Config
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "#B #H L T"],
        memory: Float[Array, "B S D"] | None = None,
        memory_bias: Float[Array, "B 1 1 S"] | None = None,
        start: Int[Array, ""] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """Transform hidden states."""
        c = self.config

        def normed(name):
            return nn.RMSNorm(c.layer_norm_epsilon, name=f"{name}_norm")(x)

        drop = partial(Dropout(c.dropout_rate), train=train)
        x += drop(Attention(c, name="attention")(normed("attention"), bias, start=start, train=train))
        if self.cross:
            attention = Attention(c, cross=True, name="cross_attention")
            x += drop(attention(normed("cross_attention"), memory_bias, memory, train=train))
        return x + drop(Mlp(c, name="mlp")(normed("mlp"), train=train))


class Encoder(nn.Module):
    """The encoder: embeddings (B, S, D), and which of them are real, to hidden states (B, S, D)."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], real: Bool[Array, "B S"], *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Apply every layer and a final norm."""
        c, at = self.config, jnp.arange(x.shape[1])
        drop = partial(Dropout(c.dropout_rate), train=train)
        bias = Positions(c, both=True, name="position")(at, at) + bias_where(real)[:, None, None]
        x = drop(x)
        x = scan.run(
            lambda name: Layer(c, cross=False, name=name),
            lambda layer, x, _: layer(x, bias, train=train),
            x,
            [None] * c.num_layers,
            scan=c.scan_layers,
        )
        return drop(nn.RMSNorm(c.layer_norm_epsilon, name="norm")(x))


class Decoder(nn.Module):
    """The decoder: embeddings (B, L, D) and the encoder's output to hidden states (B, L, D)."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        place: cache.Place,
        memory: Float[Array, "B S D"] | None,
        heard: Bool[Array, "B S"],
        *,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """Apply every layer and a final norm."""
        c = self.config
        drop = partial(Dropout(c.dropout_rate), train=train)
        queries, keys = place.start + jnp.arange(x.shape[1]), jnp.arange(place.real.shape[1])
        bias = Positions(c, both=False, name="position")(queries, keys) + bias_where(place.seen)
        memory_bias = bias_where(heard)[:, None, None]
        x = drop(x)
        x = scan.run(
            lambda name: Layer(c, cross=True, name=name),
            lambda layer, x, _: layer(x, bias, memory, memory_bias, place.start, train=train),
            x,
            [None] * (c.num_decoder_layers or 0),
            scan=c.scan_layers,
        )
        return drop(nn.RMSNorm(c.layer_norm_epsilon, name="norm")(x))


class Embeddings(nn.Module):
    """Word embeddings of encoder and decoder, ids (B, L) to (B, L, D); the same table can be the last layer."""

    config: T5Config

    def setup(self):  # noqa: D102
        c = self.config
        self.word = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(c.initializer_factor)
        )

    def __call__(self, ids: Ids) -> Float[Array, "B L D"]:
        """Look up."""
        return self.word(ids)

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Return the logits."""
        return self.word.attend(x)


class T5(nn.Module):
    """T5 with its language-model head.

    Returns ``encoded`` (B, S, D), the encoder's states after the final norm, and ``features`` (B, D), their mean over
    real tokens. With ``decoder_input_ids`` it also returns ``token_logits`` (B, L, V), of the next token at each
    position, and ``sequence`` (B, L, D), the decoder's states after the final norm.

    With a ``cache`` collection (``T5Config.cache``) the decoder's tokens continue those in the cache, which must have
    room for them, and the input of an earlier forward need not be given again: a batch without ``input_ids`` returns no
    ``encoded`` and no ``features``. The updated collection is part of the state.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self,
        input_ids: Texts | None = None,
        attention_mask: Texts | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_attention_mask: Ids | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Encode and decode; without a mask every token is real."""
        c, outputs = self.config, {}
        embeddings = Embeddings(c, name="embeddings")
        encoded, heard = None, self.get_variable("cache", "heard", jnp.zeros((0, 0), bool))
        if input_ids is not None:
            real = _real(input_ids, attention_mask)
            encoded = Encoder(c, name="encoder")(embeddings(input_ids), real, train=train)
            outputs = {"encoded": encoded, "features": mean_over(encoded, attention_mask)}
            heard = real
            if self.has_variable("cache", "heard"):
                self.put_variable("cache", "heard", real)
        elif not heard.shape[1]:
            raise InputError("T5 needs input_ids, or a cache of what it has read: the batch has neither")
        if decoder_input_ids is None:
            return outputs
        place = cache.place(self, _real(decoder_input_ids, decoder_attention_mask))
        x = Decoder(c, name="decoder")(embeddings(decoder_input_ids), place, encoded, heard, train=train)
        scaled = x * c.d_model**-0.5 if c.scale_decoder_outputs else x
        if c.tie_word_embeddings:
            logits = embeddings.attend(scaled)
        else:
            logits = dense(c.vocab_size, "lm_head", c.initializer_factor, bias=False)(scaled)
        return {**outputs, "token_logits": logits, "sequence": x}


def _real(ids: Ids, mask: Ids | None) -> Bool[Array, "B L"]:
    return jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) != 0


def tensors(config: T5Config) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""

    def norm(path, key):
        return {f"params/{path}/scale": Tensor(f"{key}.weight")}

    names = {"params/embeddings/word/embedding": Tensor("shared.weight")}
    for side, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers or 0)):
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"params/{side}/position/distance/embedding"] = Tensor(first)
        parts = {"attention": "SelfAttention"} | (
            {"cross_attention": "EncDecAttention"} if side == "decoder" else {}
        )
        for i in range(layers):
            ours, theirs = f"{side}/layer_{i}", f"{side}.block.{i}.layer"
            for place, (part, key) in enumerate(parts.items()):
                for name in ("query", "key", "value", "output"):
                    names |= linear(f"{ours}/{part}/{name}", f"{theirs}.{place}.{key}.{name[0]}", bias=False)
                names |= norm(f"{ours}/{part}_norm", f"{theirs}.{place}.layer_norm")
            mlp = {"gate": "wi_0", "intermediate": "wi_1"} if config.gated else {"intermediate": "wi"}
            for name, key in (*mlp.items(), ("output", "wo")):
                names |= linear(
                    f"{ours}/mlp/{name}", f"{theirs}.{len(parts)}.DenseReluDense.{key}", bias=False
                )
            names |= norm(f"{ours}/mlp_norm", f"{theirs}.{len(parts)}.layer_norm")
        names |= norm(f"{side}/norm", f"{side}.final_layer_norm")
    return names if config.tie_word_embeddings else names | linear("lm_head", "lm_head", bias=False)


def example(config: T5Config) -> dict[str, np.ndarray]:
    """Return a batch of one text of one token, and one token for the decoder."""
    return {"input_ids": np.zeros((1, 1), np.int32), "decoder_input_ids": np.zeros((1, 1), np.int32)}


# Checkpoints (hub id: layers of each side x width, heads of 64):
#   google-t5/t5-small: 6 x 512, 8; t5-base: 12 x 768, 12; t5-large: 24 x 1024, 16            https://arxiv.org/abs/1910.10683
#   google/t5-v1_1-small: 8 x 512, 6; -base: 12 x 768, 12; google/flan-t5-small, -base: the same shapes
#   google/flan-t5-large: 24 x 1024, 16; -xl: 24 x 2048, 32                                   https://arxiv.org/abs/2210.11416
ARCHITECTURE = Architecture(
    name="t5",
    config=T5Config,
    module=T5,
    tensors=tensors,
    prefix="",
    head=T5Config.head,
    example=example,
    base_class="T5ForConditionalGeneration",
    ignored=(
        r"(encoder|decoder)\.embed_tokens\.weight",  # copies of the shared table
        r"lm_head\.weight",  # likewise, if it is tied
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never used
    ),
    settle=T5Config.settled,
)
