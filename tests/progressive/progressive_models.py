"""Small models of three architectures to grow, and batches for them."""

import jax
import jax.numpy as jnp
import numpy as np

from jtl import heads, tree
from jtl.model import Linen, Model, linen
from jtl.models.bert import Bert, BertConfig
from jtl.models.conv4 import Conv4
from jtl.models.mlp import MLP
from jtl.models.resnet12 import ResNet12
from jtl.models.vit import ViT, ViTConfig

WHERE = {
    "mlp": "dense_.*|head",
    "conv4": "conv_.*|head",
    "resnet": "conv_._.|head",
    "bert": "encoder/layer_[0-9]+|head",
    "vit": "encoder/layer_[0-9]+|head",
}
C = 3  # classes


def mlp(key, hidden=(7, 6), classes=C):
    module = MLP(hidden)
    model = linen(module, module.init(key, jnp.zeros((1, 5))))
    return heads.classifier(model, classes, key=key, on="features", width=hidden[-1])


def conv4(key):
    module = Conv4(4)
    model = linen(module, jax.jit(module.init)(key, jnp.zeros((1, 16, 16, 1))))
    return heads.classifier(model, C, key=key, on="features", width=4)


def resnet(key):
    module = ResNet12((4, 6))
    model = linen(module, jax.jit(module.init)(key, jnp.zeros((1, 16, 16, 1))))
    return heads.classifier(model, C, key=key, on="features", width=6)


def vit(key):
    config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=16,
                       patch_size=8, num_channels=1)  # fmt: skip
    module = ViT(config)
    variables = jax.jit(module.init)(key, jnp.zeros((1, 16, 16, 1)))
    return heads.classifier(Model(dict(variables), Linen(module), (), config), C, key=key)


def bert(key):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                        max_position_embeddings=8)  # fmt: skip
    module = Bert(config)
    ids = jnp.zeros((1, 6), jnp.int32)
    variables = jax.jit(module.init)(key, ids)
    return heads.classifier(Model(dict(variables), Linen(module), (), config), C, key=key)


MODELS = {"mlp": mlp, "conv4": conv4, "resnet": resnet, "bert": bert, "vit": vit}


def batch_of(kind, rows=8, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, C, rows).astype(np.int32)
    if kind == "mlp":
        return {"x": rng.normal(size=(rows, 5)).astype(np.float32), "label": label}
    if kind in ("conv4", "resnet", "vit"):
        return {"image": rng.normal(size=(rows, 16, 16, 1)).astype(np.float32), "label": label}
    ids = rng.integers(0, 20, (rows, 6)).astype(np.int32)
    mask = (np.arange(6)[None] < rng.integers(2, 7, (rows, 1))).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "label": label}


def stirred(model, pattern=".*/lateral/.*/u"):
    """Laterals that carry something: U starts at 0."""
    mask = tree.flatten(tree.matches(pattern, model.params))

    def noise(path, leaf):
        drawn = jax.random.normal(tree.fold_path(jax.random.key(7), path), leaf.shape)
        return leaf + 0.3 * drawn if mask[path] else leaf

    return model.with_params(tree.map_with_path(noise, model.params))
