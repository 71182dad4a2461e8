"""GPT-2: a pre-norm transformer decoder with learned positions.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language Models are Unsupervised Multitask Learners",
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, section 2.3.
Numerically equal to ``transformers``, also for texts padded on either side, whose positions count only real tokens, as
in its ``generate``.

Query, key and value are one layer, ``query_key_value``, as in the files: an adapter on it opens in PEFT as one on
``c_attn``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import Architecture, HeadSpec, Tensor, linear, norm
from jtl.models.bert import example
from jtl.models.parts import cache, scan
from jtl.models.parts.attention import attend, bias_where
from jtl.models.parts.cache import Place
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, Mlp, activation, dense, last_over

HEAD = HeadSpec("features", {"out": "score"}, "GPT2ForSequenceClassification", bias=False)
Scale = float | Float[Array, ""]
ONLY = {"add_cross_attention": (False, None), "quantization_config": (None,)}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The dimensions of GPT-2, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "gpt2"
    head: ClassVar[HeadSpec] = HEAD
    head_dropout: ClassVar[float] = 0.0

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # rounding in half precision; here the softmax is always in float32
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    scan_layers: bool = False  # jtl's own: see jtl.models.parts.scan

    def __post_init__(self):
        architecture.check_heads(self.n_embd, self.n_head)
        activation(self.activation_function)

    def scale(self, layer: int) -> float:
        """Return the factor of the queries."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def residual_std(self) -> float:
        """Standard deviation of kernels that write to the residual stream; smaller with more layers."""
        return self.initializer_range / (2 * self.n_layer) ** 0.5

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.n_embd

    def cache(self, rows: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return an empty ``cache`` collection: keys and values of up to ``length`` tokens of ``rows`` texts.

        In ``Model.variables`` it makes every forward read its ``input_ids`` as the continuation of the cached tokens.

        Raises:
            ValueError: ``length`` exceeds the number of positions.
        """
        if length > self.n_positions:
            raise InputError(f"{length} tokens: this model has n_positions={self.n_positions}")
        shape = (rows, length, self.n_head, self.n_embd // self.n_head)
        layers = {
            f"layer_{i}": {"attention": cache.keys_and_values(*shape, dtype=dtype)}
            for i in range(self.n_layer)
        }
        return cache.empty(rows, length, decoder=scan.stacked(layers) if self.scan_layers else layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type, only=ONLY)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        fields = dataclasses.asdict(self)
        del fields["scan_layers"]
        return {"model_type": self.model_type, **fields}


class Attention(nn.Module):
    """Causal self-attention: (B, L, D) to (B, L, D).

    With a ``cache``, keys and values are written to it at ``place.start``, and all its tokens are attended to.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], place: Place, scale: Scale, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Attend, with queries multiplied by ``scale``."""
        c = self.config
        B, L, D = x.shape
        heads = (B, L, c.n_head, D // c.n_head)
        fused = dense(3 * D, "query_key_value", c.initializer_range)(x)
        q_BxLxHxE, k_BxLxHxE, v_BxLxHxE = (part.reshape(heads) for part in jnp.split(fused, 3, -1))
        k_BxTxHxE = cache.remembered(self, "keys", k_BxLxHxE, place.start)
        v_BxTxHxE = cache.remembered(self, "values", v_BxLxHxE, place.start)
        q, k, v = (
            t.transpose(0, 2, 1, 3) for t in (q_BxLxHxE * jnp.asarray(scale, x.dtype), k_BxTxHxE, v_BxTxHxE)
        )
        y_BxHxLxE = attend(q, k, v, bias_where(place.seen), partial(Dropout(c.attn_pdrop), train=train))
        return dense(D, "output", c.residual_std)(y_BxHxLxE.transpose(0, 2, 1, 3).reshape(B, L, D))


class Layer(nn.Module):
    """Attention, then MLP; each reads the normalised input and is added to it: (B, L, D) to (B, L, D)."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], place: Place, scale: Scale, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Transform hidden states."""
        c = self.config
        norm, drop = partial(nn.LayerNorm, c.layer_norm_epsilon), partial(Dropout(c.resid_pdrop), train=train)
        attention = Attention(c, name="attention")
        x += drop(attention(norm(name="attention_norm")(x), place, scale, train=train))
        inner = 4 * c.n_embd if c.n_inner is None else c.n_inner
        mlp = Mlp(inner, c.activation_function, c.initializer_range, c.residual_std, name="mlp")
        return x + drop(mlp(norm(name="mlp_norm")(x)))


class Decoder(nn.Module):
    """The stack of layers and a final norm: (B, L, D) to (B, L, D)."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], place: Place, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Apply every layer."""
        c = self.config
        x = scan.run(
            lambda name: Layer(c, name=name),
            lambda layer, x, scale: layer(x, place, scale, train=train),
            x,
            [c.scale(i) for i in range(c.n_layer)],
            scan=c.scan_layers,
        )
        return nn.LayerNorm(c.layer_norm_epsilon, name="norm")(x)


class Embeddings(nn.Module):
    """Word and position embeddings; the word table is also the last layer over the vocabulary."""

    config: GPT2Config

    def setup(self):  # noqa: D102
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.word = nn.Embed(c.vocab_size, c.n_embd, embedding_init=init)
        self.position = nn.Embed(c.n_positions, c.n_embd, embedding_init=init)

    def __call__(self, input_ids: Ids, positions: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Look up and add."""
        return self.word(input_ids) + self.position(positions)

    def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Return the logits."""
        return self.word.attend(x)


class GPT2(nn.Module):
    """GPT-2 with its language-model head.

    Returns ``token_logits`` (B, L, V), of the next token at each position; ``sequence`` (B, L, D), the last hidden
    states after the final norm; and ``features`` (B, D), that of the last real token of each text.

    With a ``cache`` collection (``GPT2Config.cache``) the tokens continue those in the cache, which must have room for
    them, and the updated collection is part of the state.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self, input_ids: Ids, attention_mask: Ids | None = None, *, train: bool = False
    ) -> dict[str, Array]:
        """Read; without ``attention_mask`` every token is real."""
        c, L = self.config, input_ids.shape[1]
        if L > c.n_positions:
            raise InputError(f"input_ids: length {L} exceeds n_positions={c.n_positions}")
        embeddings = Embeddings(c, name="embeddings")
        real = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        place = cache.place(self, real)
        own = lax.dynamic_slice_in_dim(cache.positions(place.real), place.start, L, 1)
        x = Dropout(c.embd_pdrop)(embeddings(input_ids, own), train=train)
        x = Decoder(c, name="decoder")(x, place, train=train)
        if c.tie_word_embeddings:
            logits = embeddings.attend(x)
        else:
            logits = dense(c.vocab_size, "lm_head", c.initializer_range, bias=False)(x)
        return {"token_logits": logits, "sequence": x, "features": last_over(x, real)}


def tensors(config: GPT2Config) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file, whose layers have the same layout as ours."""

    def layer(path, key):
        return {
            f"params/{path}/kernel": Tensor(f"{key}.weight"),
            f"params/{path}/bias": Tensor(f"{key}.bias"),
        }

    names = {
        "params/embeddings/word/embedding": Tensor("transformer.wte.weight"),
        "params/embeddings/position/embedding": Tensor("transformer.wpe.weight"),
    } | norm("decoder/norm", "transformer.ln_f")
    for i in range(config.n_layer):
        ours, theirs = f"decoder/layer_{i}", f"transformer.h.{i}"
        names |= layer(f"{ours}/attention/query_key_value", f"{theirs}.attn.c_attn")
        names |= layer(f"{ours}/attention/output", f"{theirs}.attn.c_proj")
        names |= layer(f"{ours}/mlp/intermediate", f"{theirs}.mlp.c_fc")
        names |= layer(f"{ours}/mlp/output", f"{theirs}.mlp.c_proj")
        names |= norm(f"{ours}/attention_norm", f"{theirs}.ln_1") | norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
    return names if config.tie_word_embeddings else names | linear("lm_head", "lm_head", bias=False)


# Checkpoints (hub id: layers x width, heads), all from the paper above but the last:
#   openai-community/gpt2: 12 x 768, 12; gpt2-medium: 24 x 1024, 16; gpt2-large: 36 x 1280, 20; gpt2-xl: 48 x 1600, 25
#   distilbert/distilgpt2: 6 x 768, 12                                                      https://arxiv.org/abs/1910.01108
ARCHITECTURE = Architecture(
    name="gpt2",
    config=GPT2Config,
    module=GPT2,
    tensors=tensors,
    prefix="",
    head=HEAD,
    example=example,
    base_class="GPT2LMHeadModel",
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),  # a causal mask
    renames=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),  # files of a GPT2Model, as on the hub
)
