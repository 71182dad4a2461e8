"""Wav2Vec2 and HuBERT: transformer encoders of raw audio, with a CTC layer over characters for transcripts.

Baevski et al. 2020, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations",
https://arxiv.org/abs/2006.11477; Hsu et al. 2021, "HuBERT: Self-Supervised Speech Representation Learning by Masked
Prediction of Hidden Units", https://arxiv.org/abs/2106.07447. As encoders they differ only in how they were trained.
Numerically equal to ``Wav2Vec2ForCTC`` and ``HubertForCTC`` of ``transformers`` in evaluation mode. In training those
also mask spans of the input (SpecAugment) and skip random layers, which is not done here.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jtl.errors import InputError
from jtl.models.architecture import CONV_1D, Architecture, Tensor, linear, norm
from jtl.models.parts.attention import Attention, mask_bias
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, activation, dense, mean_over
from jtl.models.wav2vec2_config import HubertConfig, Wav2Vec2Config

EPSILON = 1e-5  # of the norms between the convolutions

Audio = Float[Array | np.ndarray, "B N"]


class PositionConv(nn.Module):
    """A grouped convolution over time that encodes a frame's position: (B, S, D) to (B, S, D).

    Its weight is ``scale`` · v / |v| at each kernel position (Salimans and Kingma 2016,
    https://arxiv.org/abs/1602.07868), where v is ``kernel``.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Convolve; an even kernel sees one more frame of the past than of the future."""
        c, D = self.config, x.shape[-1]
        K, groups = c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups
        init = nn.initializers.normal(2 * (K * D) ** -0.5)
        v_KxIxD = self.param("kernel", init, (K, D // groups, D))
        scale = self.param(
            "scale", lambda key, shape: jnp.full(shape, 2 * (D / groups / K) ** 0.5), (K, 1, 1)
        )
        bias = self.param("bias", nn.initializers.zeros, (D,))
        size = jnp.sqrt(jnp.square(v_KxIxD.astype(jnp.float32)).sum((1, 2), keepdims=True))
        kernel = (scale * v_KxIxD / size).astype(x.dtype)
        padding = [(K // 2, K // 2 - (K % 2 == 0))]
        y = lax.conv_general_dilated(
            x, kernel, (1,), padding, feature_group_count=groups, dimension_numbers=("NWC", "WIO", "NWC")
        )
        return activation(c.feat_extract_activation)(y + bias[None, None])


class Embeddings(nn.Module):
    """Convolutions over the samples, a projection, and positions: (B, N) to (B, S, D)."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, audio: Audio, mask: Bool[Array, "B S"] | None, *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Embed; masked-out frames are zeroed before they get positions."""
        c = self.config
        x = jnp.asarray(audio)[..., None]
        sizes = zip(c.conv_dim, c.conv_kernel, c.conv_stride, strict=True)
        for i, (channels, kernel, stride) in enumerate(sizes):
            x = nn.Conv(channels, (kernel,), stride, "VALID", use_bias=c.conv_bias, name=f"conv_{i}")(x)
            if c.feat_extract_norm == "layer":
                x = nn.LayerNorm(EPSILON, name=f"conv_{i}_norm")(x)
            elif i == 0:  # per channel over time, including padding
                x = nn.GroupNorm(channels, epsilon=EPSILON, name="conv_0_norm")(x)
            x = activation(c.feat_extract_activation)(x)
        if c.feat_proj_layer_norm:
            x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        x = Dropout(c.feat_proj_dropout)(
            dense(c.hidden_size, "projection", c.initializer_range)(x), train=train
        )
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        x += PositionConv(c, name="position")(x)
        if not c.do_stable_layer_norm:
            x = nn.LayerNorm(c.layer_norm_eps, name="output_norm")(x)
        return Dropout(c.hidden_dropout)(x, train=train)


class Mlp(nn.Module):
    """Two dense layers with an activation between them, and dropout after each: (B, S, D) to (B, S, D)."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], *, train: bool = False) -> Float[Array, "B S D"]:
        """Apply both layers."""
        c = self.config
        h = activation(c.hidden_act)(dense(c.intermediate_size, "intermediate", c.initializer_range)(x))
        h = Dropout(c.activation_dropout)(h, train=train)
        return Dropout(c.hidden_dropout)(dense(x.shape[-1], "output", c.initializer_range)(h), train=train)


class Layer(nn.Module):
    """Attention, then MLP, each added to its input: (B, S, D) to (B, S, D).

    Norms come after each, or with ``do_stable_layer_norm`` before each.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "B 1 1 S"] | None, *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Transform hidden states."""
        c = self.config
        attention_norm = nn.LayerNorm(c.layer_norm_eps, name="attention_norm")
        mlp_norm = nn.LayerNorm(c.layer_norm_eps, name="mlp_norm")
        attention = Attention(
            c.num_attention_heads, c.attention_dropout, std=c.initializer_range, name="attention"
        )

        def attended(x):
            return Dropout(c.hidden_dropout)(attention(x, bias, train=train), train=train)

        mlp = Mlp(c, name="mlp")
        if c.do_stable_layer_norm:
            x += attended(attention_norm(x))
            return x + mlp(mlp_norm(x), train=train)
        x = attention_norm(x + attended(x))
        return mlp_norm(x + mlp(x, train=train))


class Encoder(nn.Module):
    """The stack of layers, and a final norm if theirs come first: (B, S, D) to (B, S, D)."""

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], bias: Float[Array, "B 1 1 S"] | None, *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """Apply every layer."""
        c = self.config
        for i in range(c.num_hidden_layers):
            x = Layer(c, name=f"layer_{i}")(x, bias, train=train)
        return nn.LayerNorm(c.layer_norm_eps, name="norm")(x) if c.do_stable_layer_norm else x


class Wav2Vec2(nn.Module):
    """Wav2Vec2 or HuBERT.

    Returns ``sequence`` (B, S, D), the last hidden states; ``sequence_mask`` (B, S), which frames are of real samples;
    ``features`` (B, D), the mean over these; and with ``config.ctc`` the ``token_logits`` (B, S, V) of every frame.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(
        self, audio: Audio, attention_mask: Ids | None = None, *, train: bool = False
    ) -> dict[str, Array]:
        """Encode; without ``attention_mask`` every sample is real. Padding belongs after the samples."""
        c = self.config
        frames = c.frames(audio.shape[1])
        if frames < 1:
            raise InputError(f"audio: shape {audio.shape} is too short for a frame of {c.shortest} samples")
        real, mask = jnp.ones((audio.shape[0], frames), bool), None
        if attention_mask is not None:
            lengths = c.frames(attention_mask.sum(1))
            real = mask = jnp.arange(frames)[None] < lengths[:, None]
        x = Embeddings(c, name="embeddings")(audio, mask, train=train)
        bias = None if mask is None else mask_bias(mask.astype(jnp.int32))
        x = Encoder(c, name="encoder")(x, bias, train=train)
        outputs = {"sequence": x, "sequence_mask": real, "features": mean_over(x, real.astype(jnp.int32))}
        if c.ctc:
            head = dense(c.vocab_size, "lm_head", c.initializer_range)
            outputs["token_logits"] = head(Dropout(c.final_dropout)(x, train=train))
        return outputs


def tensors(config: Wav2Vec2Config) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    prefix, names = config.model_type, {}
    for i in range(len(config.conv_dim)):
        ours, theirs = f"embeddings/conv_{i}", f"{prefix}.feature_extractor.conv_layers.{i}"
        names[f"params/{ours}/kernel"] = Tensor(f"{theirs}.conv.weight", CONV_1D)
        if config.conv_bias:
            names[f"params/{ours}/bias"] = Tensor(f"{theirs}.conv.bias")
        if i == 0 or config.feat_extract_norm == "layer":
            names |= norm(f"embeddings/conv_{i}_norm", f"{theirs}.layer_norm")
    if config.feat_proj_layer_norm:
        names |= norm("embeddings/norm", f"{prefix}.feature_projection.layer_norm")
    names |= linear("embeddings/projection", f"{prefix}.feature_projection.projection")
    ours, theirs = "params/embeddings/position", f"{prefix}.encoder.pos_conv_embed.conv"
    names[f"{ours}/kernel"] = Tensor(f"{theirs}.parametrizations.weight.original1", CONV_1D)
    names[f"{ours}/scale"] = Tensor(f"{theirs}.parametrizations.weight.original0", CONV_1D)
    names[f"{ours}/bias"] = Tensor(f"{theirs}.bias")
    outer = "encoder/norm" if config.do_stable_layer_norm else "embeddings/output_norm"
    names |= norm(outer, f"{prefix}.encoder.layer_norm")
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"{prefix}.encoder.layers.{i}"
        for part, proj in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
            names |= linear(f"{ours}/attention/{part}", f"{theirs}.attention.{proj}_proj")
        names |= norm(f"{ours}/attention_norm", f"{theirs}.layer_norm")
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.feed_forward.intermediate_dense")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.feed_forward.output_dense")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")
    return names | linear("lm_head", "lm_head") if config.ctc else names


def example(config: Wav2Vec2Config) -> dict[str, np.ndarray]:
    """Return a batch of one recording of one frame."""
    return {"audio": np.zeros((1, config.shortest), np.float32)}


def _family(config: type[Wav2Vec2Config]) -> Architecture:
    name = config.model_type
    return Architecture(
        name=name,
        config=config,
        module=Wav2Vec2,
        tensors=tensors,
        prefix="",
        head=config().head,
        example=example,
        base_class=f"{config.task}Model",
        # Used to mask spans in training; needed only for pretraining.
        ignored=(rf"{name}\.masked_spec_embed", r"(quantizer|project_q|project_hid)\..*"),
        renames=(
            (r"^(masked_spec_embed$|(?:feature_extractor|feature_projection|encoder)\.)", rf"{name}.\1"),
            (r"\.weight_g$", ".parametrizations.weight.original0"),  # torch's older weight norm
            (r"\.weight_v$", ".parametrizations.weight.original1"),
        ),
    )


# Checkpoints (hub id: layers x width, heads):
#   facebook/wav2vec2-base, -base-960h: 12 x 768, 12                                        https://arxiv.org/abs/2006.11477
#   facebook/wav2vec2-large-960h-lv60-self, -xlsr-53: 24 x 1024, 16, pre-norm         https://arxiv.org/abs/2006.13979
#   facebook/hubert-base-ls960: 12 x 768, 12; -large-ls960-ft: 24 x 1024, 16                https://arxiv.org/abs/2106.07447
ARCHITECTURES = tuple(_family(config) for config in (Wav2Vec2Config, HubertConfig))
