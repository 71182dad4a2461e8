"""The oracle of prompts and prefixes: a post-norm encoder on one text without padding, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from jtl import tree
from jtl.model import linen
from jtl.models import ARCHITECTURES

SIZES = {
    "bert": dict(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
                 max_position_embeddings=16),
    "roberta": dict(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
                    max_position_embeddings=18, type_vocab_size=2),
    "distilbert": dict(vocab_size=30, dim=12, n_layers=2, n_heads=3, hidden_dim=20, max_position_embeddings=16),
    "vit": dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=4,
                patch_size=2, num_channels=1),
    "efficientnet_lite": {},
}  # fmt: skip
FIRST = {"bert": 0, "roberta": 2, "distilbert": 0}  # the position of a first token
PAD = {"bert": 0, "roberta": 1, "distilbert": 0}


def small(name):
    """A small model with every leaf at random, positions and biases too."""
    architecture = ARCHITECTURES[name]
    config = architecture.config(**SIZES[name])
    module = architecture.module(config)
    example = {field: jnp.asarray(value) for field, value in architecture.example(config).items()}
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **example))
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in tree.flatten(shapes).items()
    }
    return linen(module, tree.nest(leaves)).replace(config=config)


def texts(name, lengths=(6, 3, 1), left=False):
    """A batch of texts padded to the longest, and the texts."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 30, n).astype(np.int32) for n in lengths]
    types = [rng.integers(0, 2, n).astype(np.int32) for n in lengths]
    longest = max(lengths)

    def padded(row, value):
        fill = (longest - len(row), 0) if left else (0, longest - len(row))
        return np.pad(row, fill, constant_values=value)

    batch = {
        "input_ids": np.stack([padded(row, PAD[name]) for row in rows]),
        "attention_mask": np.stack([padded(np.ones_like(row), 0) for row in rows]),
    }
    if name == "bert":
        batch["token_type_ids"] = np.stack([padded(row, 0) for row in types])
    return batch, rows, types


def encode(model, ids, types, *, positions, prompt=None, prefix=None):
    """The last hidden states, (p + L, D) with a prompt, else (L, D)."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model.params).items()}
    x = p["embeddings/word/embedding"][ids]
    if prompt is not None:
        x = np.concatenate([np.asarray(prompt, np.float64), x])
        types = np.concatenate([np.zeros(len(prompt), int), types])
    x = x + p["embeddings/position/embedding"][positions]
    if "embeddings/token_type/embedding" in p:
        known = types if model.config.model_type == "bert" else np.zeros(len(x), int)
        x = x + p["embeddings/token_type/embedding"][known]
    x = norm(p, "embeddings/norm", x)
    for i in range(2):
        layer = f"encoder/layer_{i}"
        own = None if prefix is None else prefix[i]
        y = attend(p, f"{layer}/attention", x, own)
        x = norm(p, f"{layer}/attention_norm", x + y)
        hidden = affine(p, f"{layer}/mlp/intermediate", x)
        hidden = hidden * 0.5 * (1 + erf(hidden / 2**0.5))
        x = norm(p, f"{layer}/mlp_norm", x + affine(p, f"{layer}/mlp/output", hidden))
    return x


def attend(p, path, x, prefix=None, heads=3, causal=False):
    """Attention of one text, a head and a query at a time, with keys and values (p, D) in front."""
    q, k, v = (affine(p, f"{path}/{name}", x) for name in ("query", "key", "value"))
    before = 0
    if prefix is not None:
        before = len(prefix[0])
        k, v = (
            np.concatenate([np.asarray(own, np.float64), y]) for own, y in zip(prefix, (k, v), strict=True)
        )
    out, size = np.zeros_like(q), q.shape[1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            seen = before + i + 1 if causal else len(k)
            weights = np.exp(k[:seen, part] @ q[i, part] / size**0.5)
            out[i, part] = weights @ v[:seen, part] / weights.sum()
    return affine(p, f"{path}/output", out)


def affine(p, path, x):
    return x @ p[f"{path}/kernel"] + p[f"{path}/bias"]


def norm(p, path, x):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * p[f"{path}/scale"]
        + p[f"{path}/bias"]
    )


def pooled(model, first):
    """What ``pooled`` is of a first hidden state."""
    if model.config.model_type != "bert":
        return first
    p = tree.flatten(model.params)
    return np.tanh(first @ np.asarray(p["pooler/kernel"]) + np.asarray(p["pooler/bias"]))


def torch_model(name, folder):
    """A classifier of transformers with every parameter at random, saved; dropout off."""
    import torch
    import transformers

    config, cls = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification),
    }[name]
    torch.manual_seed(0)
    model = cls(config(**SIZES[name], num_labels=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return model


def torch_logits(model, batch):
    import torch

    with torch.no_grad():
        return model.eval()(
            **{field: torch.tensor(value).long() for field, value in batch.items()}
        ).logits.numpy()
