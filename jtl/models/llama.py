"""Llama and its relatives Mistral, Qwen2 and Qwen3: pre-norm transformer decoders with gated MLPs.

Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288, with
RMSNorm (https://arxiv.org/abs/1910.07467), SwiGLU (https://arxiv.org/abs/2002.05202), rotary positions
(``jtl.models.parts.rope``) and grouped-query attention (https://arxiv.org/abs/2305.13245). Mistral
(https://arxiv.org/abs/2310.06825) adds a sliding window, Qwen2 (https://arxiv.org/abs/2407.10671) biases of query, key
and value, Qwen3 (https://arxiv.org/abs/2505.09388) a norm of queries and keys. Numerically equal to ``transformers``,
also for texts padded on either side.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jtl.models.architecture import Architecture, Tensor, linear
from jtl.models.bert import example
from jtl.models.llama_config import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from jtl.models.parts import cache, rope, scan
from jtl.models.parts.layers import Ids, activation, dense, last_over

Window = int | Int[Array, ""] | None
FAR = 2**30  # a window so large that it masks nothing


class Place(NamedTuple):
    """Where the L tokens of a forward are among the T tokens that attention sees: see ``jtl.models.parts.cache.Place``.

    Attributes:
        start: position of the first in the cache.
        position: of each of the T tokens, counting only real ones.
        angles: rotary angles of the L tokens.
        seen: whether token q may attend to token k.
    """

    start: Int[Array, ""]
    position: Int[Array, "B T"]
    angles: Float[Array, "B L R"]
    seen: Bool[Array, "B 1 L T"]

    def mask(self, window: Window) -> Bool[Array, "B 1 L T"]:
        """Return ``seen`` restricted to keys fewer than ``window`` positions before the query."""
        if window is None:
            return self.seen
        queries = lax.dynamic_slice_in_dim(self.position, self.start, self.angles.shape[1], 1)
        near = queries[:, :, None] - self.position[:, None] < window
        return self.seen & near[:, None]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023): (B, L, D) to (B, L, D).

    With a ``cache``, keys and values are written to it at ``place.start``, and all its tokens are attended to.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], place: Place, window: Window) -> Float[Array, "B L D"]:
        """Attend to at most ``window`` tokens."""
        c = self.config
        (B, L, D), E = x.shape, c.per_head
        (inner, outer), std = c.biases, c.initializer_range

        def heads(name, count):
            return dense(count * E, name, std, inner)(x).reshape(B, L, count, E)

        q_BxLxNxE, k_BxLxKxE = heads("query", c.num_attention_heads), heads("key", c.groups)
        v_BxLxKxE = heads("value", c.groups)
        if c.qk_norm:
            q_BxLxNxE = nn.RMSNorm(c.rms_norm_eps, name="query_norm")(q_BxLxNxE)
            k_BxLxKxE = nn.RMSNorm(c.rms_norm_eps, name="key_norm")(k_BxLxKxE)
        q_BxLxNxE, k_BxLxKxE = (rope.rotate(t, place.angles) for t in (q_BxLxNxE, k_BxLxKxE))
        k_BxTxKxE = cache.remembered(self, "keys", k_BxLxKxE, place.start)
        v_BxTxKxE = cache.remembered(self, "values", v_BxLxKxE, place.start)
        y = jax.nn.dot_product_attention(q_BxLxNxE, k_BxTxKxE, v_BxTxKxE, mask=place.mask(window))
        return dense(D, "output", std, outer)(y.reshape(B, L, -1))


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020): (B, L, D) to (B, L, D)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Apply the gated layers."""
        c = self.config
        layer = partial(dense, std=c.initializer_range, bias=c.mlp_bias)
        gate = activation(c.hidden_act)(layer(c.intermediate_size, "gate")(x))
        return layer(c.hidden_size, "output")(gate * layer(c.intermediate_size, "intermediate")(x))


class Layer(nn.Module):
    """Attention, then MLP; each reads the normalised input and is added to it: (B, L, D) to (B, L, D)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], place: Place, window: Window) -> Float[Array, "B L D"]:
        """Transform hidden states."""
        norm = partial(nn.RMSNorm, self.config.rms_norm_eps)
        x += Attention(self.config, name="attention")(norm(name="attention_norm")(x), place, window)
        return x + Mlp(self.config, name="mlp")(norm(name="mlp_norm")(x))


class Decoder(nn.Module):
    """The stack of layers and a final norm: (B, L, D) to (B, L, D)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], place: Place) -> Float[Array, "B L D"]:
        """Apply every layer."""
        c = self.config
        windows = [c.window(i) for i in range(c.num_hidden_layers)]
        if len(set(windows)) > 1:
            windows = [FAR if window is None else window for window in windows]
        x = scan.run(
            lambda name: Layer(c, name=name),
            lambda layer, x, window: layer(x, place, window),
            x,
            windows,
            scan=c.scan_layers,
        )
        return nn.RMSNorm(c.rms_norm_eps, name="norm")(x)


class Embeddings(nn.Module):
    """Word embeddings, ids (B, L) to (B, L, D); the same table is also the last layer over the vocabulary."""

    config: LlamaConfig

    def setup(self):  # noqa: D102
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.word = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=init)

    def __call__(self, input_ids: Ids) -> Float[Array, "B L D"]:
        """Look up."""
        return self.word(input_ids)

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Return the logits."""
        return self.word.attend(x)


class Llama(nn.Module):
    """Llama with its language-model head.

    Returns ``token_logits`` (B, L, V), of the next token at each position; ``sequence`` (B, L, D), the last hidden
    states after the final norm; and ``features`` (B, D), that of the last real token of each text.

    Positions count only real tokens. They may exceed ``max_position_embeddings``, but no such model was trained there.

    With a ``cache`` collection (``LlamaConfig.cache``) the tokens continue those in the cache, which must have room for
    them, and the updated collection is part of the state.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, input_ids: Ids, attention_mask: Ids | None = None) -> dict[str, Array]:
        """Read; without ``attention_mask`` every token is real."""
        c = self.config
        embeddings = Embeddings(c, name="embeddings")
        real = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        x = Decoder(c, name="decoder")(embeddings(input_ids), self._place(real))
        if c.tie_word_embeddings:
            logits = embeddings.attend(x)
        else:
            logits = dense(c.vocab_size, "lm_head", c.initializer_range, bias=False)(x)
        return {"token_logits": logits, "sequence": x, "features": last_over(x, real)}

    def _place(self, new: Bool[Array, "B L"]) -> Place:
        at = cache.place(self, new)
        position = cache.positions(at.real)
        turns = rope.frequencies(self.config.per_head, self.config.rope_theta, self.config.rope_scaling)
        own = lax.dynamic_slice_in_dim(position, at.start, new.shape[1], 1)
        return Place(at.start, position, own[..., None] * turns[None, None], at.seen)


def tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""

    def norm(path, key):
        return {f"params/{path}/scale": Tensor(f"{key}.weight")}

    names = {"params/embeddings/word/embedding": Tensor("model.embed_tokens.weight")}
    inner, outer = config.biases
    for i in range(config.num_hidden_layers):
        ours, theirs = f"decoder/layer_{i}", f"model.layers.{i}"
        for name in ("query", "key", "value"):
            names |= linear(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name[0]}_proj", bias=inner)
        names |= linear(f"{ours}/attention/output", f"{theirs}.self_attn.o_proj", bias=outer)
        for name in ("query", "key") if config.qk_norm else ():
            names |= norm(f"{ours}/attention/{name}_norm", f"{theirs}.self_attn.{name[0]}_norm")
        for name, key in (("gate", "gate"), ("intermediate", "up"), ("output", "down")):
            names |= linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{key}_proj", bias=config.mlp_bias)
        names |= norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm")
    names |= norm("decoder/norm", "model.norm")
    return names if config.tie_word_embeddings else names | linear("lm_head", "lm_head", bias=False)


RENAMES = (
    (r"^(embed_tokens|layers|norm)\.", r"model.\1."),  # files without the language-model head
    # GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_(q|k)_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"^blk\.(\d+)\.attn_(q|k|v)\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
)


def _family(config: type[LlamaConfig]) -> Architecture:
    return Architecture(
        name=config.model_type,
        config=config,
        module=Llama,
        tensors=tensors,
        prefix="",
        head=config().head,
        example=example,
        base_class=f"{config.task}ForCausalLM",
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
        renames=RENAMES,
    )


# Checkpoints (hub id: layers x width, heads / key-value heads):
#   HuggingFaceTB/SmolLM2-135M, -135M-Instruct: 30 x 576, 9 / 3; -360M: 32 x 960, 15 / 5    https://arxiv.org/abs/2502.02737
#   TinyLlama/TinyLlama-1.1B-Chat-v1.0: 22 x 2048, 32 / 4                                   https://arxiv.org/abs/2401.02385
#   meta-llama/Llama-2-7b-hf: 32 x 4096, 32 / 32                                            https://arxiv.org/abs/2307.09288
#   meta-llama/Llama-3.2-1B: 16 x 2048, 32 / 8, scaling llama3                              https://arxiv.org/abs/2407.21783
#   mistralai/Mistral-7B-v0.1: 32 x 4096, 32 / 8, window 4096                               https://arxiv.org/abs/2310.06825
#   Qwen/Qwen2.5-0.5B: 24 x 896, 14 / 2                                                     https://arxiv.org/abs/2412.15115
#   Qwen/Qwen3-0.6B: 28 x 1024, 16 / 8, heads of 128                                        https://arxiv.org/abs/2505.09388
ARCHITECTURES = tuple(_family(config) for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config))
