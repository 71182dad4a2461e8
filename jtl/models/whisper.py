"""Whisper: an encoder-decoder transformer for speech recognition, from log-mel spectrogram to transcript.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356,
section 2.2. Numerically equal to ``WhisperForConditionalGeneration`` of ``transformers`` for spectrograms of the length
used in training; shorter ones work too, with the first positions.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl.errors import InputError
from jtl.models.architecture import CONV_1D, Architecture, Tensor, linear, norm
from jtl.models.parts import cache
from jtl.models.parts.attention import attend, bias_where
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, Mlp, activation, dense
from jtl.models.whisper_config import WhisperConfig

EPSILON = 1e-5  # of every layer norm

Mels = Float[Array | np.ndarray, "B T M"]


def sinusoids(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Float[Array, "L D"]:
    """Sines, then cosines, of positions at D / 2 wavelengths from 2 pi to 20,000 pi, in geometric progression."""
    length, width = shape
    rates = jnp.exp(-jnp.log(10000.0) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1).astype(dtype)


class Attention(nn.Module):
    """Multi-head attention to itself or to the encoder's output: (B, L, D) to (B, L, D).

    With a ``cache``, keys and values of ``memory`` are kept for forwards without it; those of x are written at
    ``start``.
    """

    heads: int
    std: float
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        memory: Float[Array, "B S D"] | None = None,
        mask: Bool[Array, "#B 1 L T"] | None = None,
        start: Int[Array, ""] | None = None,
    ) -> Float[Array, "B L D"]:
        """Attend where the mask is set."""
        (B, L, D), H = x.shape, self.heads

        def heads(name, source, bias=True):
            return dense(D, name, self.std, bias)(source).reshape(B, -1, H, D // H)

        q_BxLxHxE = heads("query", x)
        source = memory if self.cross else x
        if source is None:
            k_BxTxHxE = cache.recalled(self, "keys", x.dtype)
            v_BxTxHxE = cache.recalled(self, "values", x.dtype)
        else:
            k_BxTxHxE = cache.remembered(self, "keys", heads("key", source, bias=False), start)
            v_BxTxHxE = cache.remembered(self, "values", heads("value", source), start)
        # Heads before tokens, as in the cache: nothing is transposed per generated token.
        q, k, v = (t.swapaxes(1, 2) for t in (q_BxLxHxE * (D // H) ** -0.5, k_BxTxHxE, v_BxTxHxE))
        y_BxHxLxE = attend(q, k, v, None if mask is None else bias_where(mask), lambda weights: weights)
        return dense(D, "output", self.std)(y_BxHxLxE.swapaxes(1, 2).reshape(B, L, D))


class Layer(nn.Module):
    """Attention, cross-attention (in the decoder), then MLP; each reads the normalised input and is added to it."""

    heads: int
    hidden: int
    cross: bool
    config: WhisperConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        memory: Float[Array, "B S D"] | None = None,
        mask: Bool[Array, "#B 1 L T"] | None = None,
        start: Int[Array, ""] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """Transform hidden states."""
        c = self.config

        def normed(name):
            return nn.LayerNorm(EPSILON, name=f"{name}_norm")(x)

        def dropped(y):
            return Dropout(c.dropout)(y, train=train)

        attention = Attention(self.heads, c.init_std, name="attention")
        x += dropped(attention(normed("attention"), mask=mask, start=start))
        if self.cross:
            attention = Attention(self.heads, c.init_std, cross=True, name="cross_attention")
            x += dropped(attention(normed("cross_attention"), memory))
        mlp = Mlp(self.hidden, c.activation_function, c.init_std, name="mlp")
        return x + dropped(mlp(normed("mlp")))


class AudioEmbeddings(nn.Module):
    """Two convolutions over time, the second of stride 2, plus positions: (B, T, M) to (B, T / 2, D)."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, log_mel: Mels) -> Float[Array, "B S D"]:
        """Embed.

        Raises:
            ValueError: the spectrogram has another number of mel bins, or is too long.
        """
        c, gelu = self.config, activation("gelu")
        if log_mel.shape[2] != c.num_mel_bins or not 0 < log_mel.shape[1] <= 2 * c.max_source_positions:
            raise InputError(
                f"log_mel: shape {log_mel.shape}, expected (B, T, {c.num_mel_bins}) with T up to "
                f"{2 * c.max_source_positions}, as jtl.data.spectrograms.log_mel(..., mels={c.num_mel_bins}) gives"
            )
        x = gelu(nn.Conv(c.d_model, (3,), padding=1, name="conv_1")(log_mel))
        x = gelu(nn.Conv(c.d_model, (3,), 2, padding=1, name="conv_2")(x))
        position = nn.Embed(c.max_source_positions, c.d_model, embedding_init=sinusoids, name="position")
        return x + position(jnp.arange(x.shape[1]))[None]


class Encoder(nn.Module):
    """The encoder: a log-mel spectrogram (B, T, M) to hidden states (B, T / 2, D)."""

    config: WhisperConfig

    @nn.compact
    def __call__(self, log_mel: Mels, *, train: bool = False) -> Float[Array, "B S D"]:
        """Embed, apply every layer and a final norm."""
        c = self.config
        x = Dropout(c.dropout)(AudioEmbeddings(c, name="embeddings")(log_mel), train=train)
        for i in range(c.encoder_layers):
            layer = Layer(c.encoder_attention_heads, c.encoder_ffn_dim, False, c, name=f"layer_{i}")
            x = layer(x, train=train)
        return nn.LayerNorm(EPSILON, name="norm")(x)


class TextEmbeddings(nn.Module):
    """Word and position embeddings; the word table is also the last layer over the vocabulary."""

    config: WhisperConfig

    def setup(self):  # noqa: D102
        c = self.config
        init = nn.initializers.normal(c.init_std)
        self.word = nn.Embed(c.vocab_size, c.d_model, embedding_init=init)
        self.position = nn.Embed(c.max_target_positions, c.d_model, embedding_init=init)

    def __call__(self, ids: Ids, start: Int[Array, ""]) -> Float[Array, "B L D"]:
        """Look up ids at positions from ``start`` on."""
        L, most = ids.shape[1], self.config.max_target_positions
        if L > most:
            raise InputError(f"decoder_input_ids: length {L} exceeds max_target_positions={most}")
        return self.word(ids) + self.position(start + jnp.arange(L))[None]

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Return the logits."""
        return self.word.attend(x)


class Decoder(nn.Module):
    """The decoder: tokens (B, L) to logits (B, L, V) of the next tokens, and the last hidden states (B, L, D)."""

    config: WhisperConfig

    @nn.compact
    def __call__(
        self,
        ids: Ids,
        memory: Float[Array, "B S D"] | None,
        mask: Bool[Array, "B 1 L T"],
        start: Int[Array, ""],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B L V"], Float[Array, "B L D"]]:
        """Embed, apply every layer and a final norm."""
        c = self.config
        embeddings = TextEmbeddings(c, name="embeddings")
        x = Dropout(c.dropout)(embeddings(ids, start), train=train)
        for i in range(c.decoder_layers):
            layer = Layer(c.decoder_attention_heads, c.decoder_ffn_dim, True, c, name=f"layer_{i}")
            x = layer(x, memory, mask, start, train=train)
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        return embeddings.attend(x), x


class Whisper(nn.Module):
    """Whisper with its language-model head.

    Returns ``encoded`` (B, T / 2, D), the encoder's states after the final norm, and ``features`` (B, D), their mean
    over time. With ``decoder_input_ids`` it also returns ``token_logits`` (B, L, V), of the next token at each
    position, and ``sequence`` (B, L, D), the decoder's states after the final norm.

    Positions count padding, so padding belongs at the end of a text.

    With a ``cache`` collection (``WhisperConfig.cache``) the tokens continue those in the cache, which must have room
    for them, and the audio of an earlier forward need not be given again: a batch without ``log_mel`` returns no
    ``encoded`` and no ``features``. The updated collection is part of the state.
    """

    config: WhisperConfig

    @nn.compact
    def __call__(
        self,
        log_mel: Mels | None = None,
        decoder_input_ids: Ids | None = None,
        decoder_attention_mask: Ids | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Encode and decode; without ``decoder_attention_mask`` every token is real."""
        if log_mel is None and not self.has_variable("cache", "filled"):
            raise InputError(
                f"{type(self).__name__} needs log_mel, or a cache of what it heard: the batch has neither"
            )
        encoded, outputs = None, {}
        if log_mel is not None:
            encoded = Encoder(self.config, name="encoder")(log_mel, train=train)
            outputs = {"encoded": encoded, "features": encoded.mean(1)}
        if decoder_input_ids is None:
            return outputs
        real = jnp.ones(decoder_input_ids.shape, bool)
        at = cache.place(self, real if decoder_attention_mask is None else decoder_attention_mask != 0)
        decoder = Decoder(self.config, name="decoder")
        logits, x = decoder(decoder_input_ids, encoded, at.seen, at.start, train=train)
        return {**outputs, "token_logits": logits, "sequence": x}


def tensors(config: WhisperConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names: dict[str, Tensor] = {}
    for i in (1, 2):
        ours, theirs = f"params/encoder/embeddings/conv_{i}", f"model.encoder.conv{i}"
        names |= {
            f"{ours}/kernel": Tensor(f"{theirs}.weight", CONV_1D),
            f"{ours}/bias": Tensor(f"{theirs}.bias"),
        }
    names["params/decoder/embeddings/word/embedding"] = Tensor("model.decoder.embed_tokens.weight")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        names[f"params/{side}/embeddings/position/embedding"] = Tensor(f"model.{side}.embed_positions.weight")
        for i in range(layers):
            ours, theirs = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            attentions = {"attention": "self_attn"}
            attentions |= {"cross_attention": "encoder_attn"} if side == "decoder" else {}
            for name, key in attentions.items():
                names |= linear(f"{ours}/{name}/key", f"{theirs}.{key}.k_proj", bias=False)
                for part, proj in (("query", "q"), ("value", "v"), ("output", "out")):
                    names |= linear(f"{ours}/{name}/{part}", f"{theirs}.{key}.{proj}_proj")
                names |= norm(f"{ours}/{name}_norm", f"{theirs}.{key}_layer_norm")
            names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.fc1")
            names |= linear(f"{ours}/mlp/output", f"{theirs}.fc2")
            names |= norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")
        names |= norm(f"{side}/norm", f"model.{side}.layer_norm")
    return names


RENAMES = (
    (r"^(encoder|decoder)\.", r"model.\1."),  # files of a WhisperModel
    # CTranslate2 (jtl.pretrained.formats.ctranslate2):
    (r"^(encoder|decoder)/", r"model.\1."),
    (r"/", "."),
    (r"\.layer_(\d+)\.", r".layers.\1."),
    (r"\.self_attention\.layer_norm\.", ".self_attn_layer_norm."),
    (r"\.attention\.layer_norm\.", ".encoder_attn_layer_norm."),
    (r"\.ffn\.layer_norm\.", ".final_layer_norm."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.attention\.", ".encoder_attn."),
    (r"\.ffn\.linear_0\.", ".fc1."),
    (r"\.ffn\.linear_1\.", ".fc2."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.position_encodings\.encodings$", ".embed_positions.weight"),
    (r"\.embeddings\.weight$", ".embed_tokens.weight"),
)


def example(config: WhisperConfig) -> dict[str, np.ndarray]:
    """Return a batch of one spectrogram of two frames and one token."""
    return {
        "log_mel": np.zeros((1, 2, config.num_mel_bins), np.float32),
        "decoder_input_ids": np.zeros((1, 1), np.int32),
    }


# Checkpoints (hub id: layers of encoder and decoder x width, heads), https://arxiv.org/abs/2212.04356:
#   openai/whisper-tiny: 4, 4 x 384, 6; -base: 6, 6 x 512, 8; -small: 12, 12 x 768, 12; -medium: 24, 24 x 1024, 16
#   openai/whisper-large-v2: 32, 32 x 1280, 20; -large-v3: the same with 128 mels; -large-v3-turbo: 32, 4 x 1280, 20
#   distil-whisper/distil-large-v3: 32, 2 x 1280, 20                                     https://arxiv.org/abs/2311.00430
ARCHITECTURE = Architecture(
    name="whisper",
    config=WhisperConfig,
    module=Whisper,
    tensors=tensors,
    prefix="",
    head=WhisperConfig.head,
    example=example,
    base_class="WhisperForConditionalGeneration",
    ignored=(r"proj_out\.weight",),  # a copy of the word embeddings
    renames=RENAMES,
)
