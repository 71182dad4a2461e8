"""CLIP: an image encoder and a text encoder whose outputs are close for images and texts that match.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020. Numerically equal to ``CLIPModel`` of ``transformers``, and with the image encoder
alone to ``CLIPForImageClassification``. ``jtl.tasks.zero_shot`` builds a classifier from class names.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError
from jtl.model import Linen, Model, with_config
from jtl.models.architecture import CONV, Architecture, Tensor, linear, norm
from jtl.models.clip_config import HEAD, LEGACY_EOS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, TowerConfig
from jtl.models.parts.attention import Attention
from jtl.models.parts.layers import Ids, Images, Mlp, dense
from jtl.models.parts.patches import pair, resample

Texts = Int[Array | np.ndarray, "T L"]  # T texts beside B images; the numbers may differ


class Layer(nn.Module):
    """Attention, then MLP; each reads the normalised input and is added to it: (B, L, D) to (B, L, D)."""

    config: TowerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 L L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Transform hidden states."""
        c = self.config
        attention = Attention(
            c.num_attention_heads, c.attention_dropout, std=c.initializer_range, name="attention"
        )
        x += attention(nn.LayerNorm(c.layer_norm_eps, name="attention_norm")(x), bias, train=train)
        mlp = Mlp(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        return x + mlp(nn.LayerNorm(c.layer_norm_eps, name="mlp_norm")(x))


class Encoder(nn.Module):
    """The stack of layers: (B, L, D) to (B, L, D)."""

    config: TowerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 L L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Apply every layer."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, bias, train=train)
        return x


class PatchEmbeddings(nn.Module):
    """A class token, then patches row by row, plus positions: (B, H, W, C) to (B, 1 + N, D).

    Positions are resampled for images of another size, as by ``interpolate_pos_encoding=True`` in ``transformers``.
    """

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, image: Images) -> Float[Array, "B N D"]:
        """Embed images of any size that holds at least one patch.

        Raises:
            ValueError: the image has another number of channels or is smaller than a patch.
        """
        c = self.config
        normal, patch, native = nn.initializers.normal(c.initializer_range), pair(c.patch_size), c.grid()
        grid = (image.shape[1] // patch[0], image.shape[2] // patch[1])
        if image.shape[-1] != c.num_channels or 0 in grid:
            raise InputError(
                f"image: shape {tuple(image.shape)} does not hold {c.num_channels} channels, patches {patch}"
            )
        conv = nn.Conv(c.hidden_size, patch, patch, "VALID", use_bias=False, kernel_init=normal, name="patch")
        patches = conv(image).reshape(len(image), -1, c.hidden_size)
        token = self.param("cls_token", normal, (c.hidden_size,)).reshape(1, 1, -1)
        table = self.param("position", normal, (1 + native[0] * native[1], c.hidden_size))
        if grid != native:
            table = jnp.concatenate([table[:1], resample(table[1:], native, grid)])
        tokens = jnp.broadcast_to(token, (len(image), 1, c.hidden_size))
        return jnp.concatenate([tokens, patches.astype(token.dtype)], 1) + table[None]


class Vision(nn.Module):
    """The image encoder: (B, H, W, C) to the last hidden states (B, 1 + N, D) and the normalised class token (B, D)."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(
        self, image: Images, *, train: bool = False
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B D"]]:
        """Encode normalised images."""
        c = self.config
        x = nn.LayerNorm(c.layer_norm_eps, name="embeddings_norm")(
            PatchEmbeddings(c, name="embeddings")(image)
        )
        x = Encoder(c, name="encoder")(x, train=train)
        return x, nn.LayerNorm(c.layer_norm_eps, name="norm")(x[:, 0])


class TokenEmbeddings(nn.Module):
    """Sum of token and position embeddings: (B, L) to (B, L, D)."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "B L D"]:
        """Look up.

        Raises:
            ValueError: a text is too long.
        """
        c, normal = self.config, nn.initializers.normal(self.config.initializer_range)
        if ids.shape[1] > c.max_position_embeddings:
            raise InputError(
                f"input_ids: length {ids.shape[1]} exceeds max_position_embeddings={c.max_position_embeddings}"
            )
        word = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=normal, name="word")(ids)
        position = nn.Embed(c.max_position_embeddings, c.hidden_size, embedding_init=normal, name="position")
        return word + position(jnp.arange(ids.shape[1]))[None]


class Text(nn.Module):
    """The text encoder: (B, L) to normalised last hidden states (B, L, D), and those at the end of each text (B, D).

    Attention is causal, so padding belongs at the end of a text.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self, ids: Ids, mask: Ids | None, *, train: bool = False
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
        """Encode texts."""
        c, ids = self.config, jnp.asarray(ids)
        seen = jnp.tril(jnp.ones((len(ids), 1, ids.shape[1], ids.shape[1]), bool))
        if mask is not None:
            seen = seen & (jnp.asarray(mask) != 0)[:, None, None]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        x = Encoder(c, name="encoder")(TokenEmbeddings(c, name="embeddings")(ids), bias, train=train)
        x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        return x, jnp.take_along_axis(x, self._ends(ids)[:, None, None], 1)[:, 0]

    def _ends(self, ids: Int[Array, "B L"]) -> Int[Array, " B"]:
        eos = self.config.eos_token_id
        return jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, 1)


class CLIP(nn.Module):
    """CLIP, with both encoders or the image encoder alone.

    Given images, it returns ``image_sequence`` (B, 1 + N, D), their last hidden states; ``pooled`` (B, D), the mean
    over patches; and ``image_embeds`` (B, P), projected to length 1. Given texts, ``text_sequence`` (T, L, E), the
    normalised last hidden states, and ``text_embeds`` (T, P). Given both, also ``logits_per_image`` (B, T): the cosines
    of all pairs times exp(``logit_scale``). ``features`` (B, P) are the embeddings of the images, else of the texts.
    The image encoder alone returns ``image_sequence``, ``pooled`` and ``features`` (B, D), the normalised state of the
    class token.
    """

    config: CLIPConfig

    @nn.compact
    def __call__(
        self,
        image: Images | None = None,
        input_ids: Texts | None = None,
        attention_mask: Texts | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Encode images, texts or both; without ``attention_mask`` every token is real.

        Raises:
            ValueError: neither is given, or texts are given to an image encoder alone.
        """
        c = self.config
        outputs: dict[str, Array] = {}
        if c.towers == "vision" and input_ids is not None:
            raise InputError("input_ids: this CLIP has its tower of images alone")
        if image is None and input_ids is None:
            raise InputError("CLIP needs image or input_ids: the batch has neither")
        if image is not None:
            x, state = Vision(c.vision, name="vision")(image, train=train)
            outputs |= {"image_sequence": x, "pooled": x[:, 1:].mean(1), "features": state}
            if c.towers == "vision":
                return outputs
            outputs["image_embeds"] = outputs["features"] = self._embed(state, "image")
        if input_ids is not None:
            outputs["text_sequence"], state = Text(c.text, name="text")(
                input_ids, attention_mask, train=train
            )
            outputs["text_embeds"] = self._embed(state, "text")
            outputs.setdefault("features", outputs["text_embeds"])
        scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale_init_value), ())
        if image is not None and input_ids is not None:
            cosines = outputs["image_embeds"] @ outputs["text_embeds"].T
            outputs["logits_per_image"] = jnp.exp(scale) * cosines
        return outputs

    def _embed(self, state: Float[Array, "B D"], kind: str) -> Float[Array, "B P"]:
        width = self.config.vision.hidden_size if kind == "image" else self.config.text.hidden_size
        x = dense(self.config.projection_dim, f"{kind}_projection", width**-0.5, bias=False)(state)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def vision_tower(model: Model) -> Model:
    """Return the image encoder of a CLIP without its projection, the base of ``CLIPForImageClassification``.

    The leaves are the model's own arrays.

    Raises:
        ValueError: the model is not a CLIP or has techniques.
    """
    if not isinstance(model.config, CLIPConfig) or not isinstance(model.base, Linen) or model.techniques:
        raise InputError(
            f"vision_tower takes a bare CLIP: found config {type(model.config).__name__}, "
            f"{len(model.techniques)} techniques"
        )
    return with_config(model.with_params({"vision": model.params["vision"]}), towers="vision")


def tensors(config: CLIPConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = {
        "params/vision/embeddings/cls_token": Tensor("vision_model.embeddings.class_embedding"),
        "params/vision/embeddings/patch/kernel": Tensor(
            "vision_model.embeddings.patch_embedding.weight", CONV
        ),
        "params/vision/embeddings/position": Tensor("vision_model.embeddings.position_embedding.weight"),
    }
    names |= norm("vision/embeddings_norm", "vision_model.pre_layrnorm")  # the files' spelling
    names |= norm("vision/norm", "vision_model.post_layernorm")
    names |= _layers("vision", config.vision)
    if config.towers == "vision":
        return names
    for name, key in (("word", "token"), ("position", "position")):
        path = f"params/text/embeddings/{name}/embedding"
        names[path] = Tensor(f"text_model.embeddings.{key}_embedding.weight")
    names |= norm("text/norm", "text_model.final_layer_norm") | _layers("text", config.text)
    names |= linear("image_projection", "visual_projection", bias=False)
    names |= linear("text_projection", "text_projection", bias=False)
    return names | {"params/logit_scale": Tensor("logit_scale")}


def _layers(tower: str, config: TowerConfig) -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"{tower}/encoder/layer_{i}", f"{tower}_model.encoder.layers.{i}"
        for part, proj in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
            names |= linear(f"{ours}/attention/{part}", f"{theirs}.self_attn.{proj}_proj")
        names |= norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2")
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.mlp.fc1")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.mlp.fc2")
    return names


def example(config: CLIPConfig) -> dict[str, np.ndarray]:
    """Return a batch of one black image of the native size and, with both encoders, a text of one token."""
    image = np.zeros((1, *pair(config.vision.image_size), config.vision.num_channels), np.float32)
    text = {"input_ids": np.zeros((1, 1), np.int32)} if config.towers == "both" else {}
    return {"image": image, **text}


# Checkpoints (hub id: layers of images and texts x width), https://arxiv.org/abs/2103.00020:
#   openai/clip-vit-base-patch32, -patch16: 12 x 768, 12 x 512; clip-vit-large-patch14: 24 x 1024, 12 x 768
#   laion/CLIP-ViT-B-32-laion2B-s34B-b79K and others                                  https://arxiv.org/abs/2212.07143
ARCHITECTURE = Architecture(
    name="clip",
    config=CLIPConfig,
    module=CLIP,
    tensors=tensors,
    prefix="",
    head=HEAD,
    example=example,
    base_class="CLIPModel",
    ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
)
