"""Pools of episodes and the network that reads them: what every algorithm of ``experiments.fewshot`` starts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common import classification
from jtl import adapters, data, features, meta, pretrained
from jtl.data import episodes, image, text
from jtl.data.batches import loader
from jtl.data.dataset import SPLITS
from jtl.errors import InputError
from jtl.model import Model, linen
from jtl.models.mlp import MLP

Adapt = Literal["all", "head", "lora"]
SCRATCH = ("conv4", "resnet12")
HIDDEN = 128  # of the network on frozen features
TRAINED = {"all": ".*", "lora": ".*/lora/.*|head/.*"}  # what of a network ever trains


@dataclass(frozen=True)
class Tasks:
    """A data set made ready for a network.

    Attributes:
        name: of the data set.
        pools: of train, validation and test classes. Images are bytes: ``episode`` scales them.
        start: from a random key to a network that gives ``features``, without a head.
        width: size of these features.
        trained: what of it trains, a rule.
        frozen: whether the pools hold the features of a pretrained model, which nothing trains.
        batch_norm: whether the network normalises by batches.
        labels: the class of each row of a pool, counted from 0 within the pool.
    """

    name: str
    pools: dict[str, episodes.Pool]
    start: Callable[[Array], Model]
    width: int
    trained: str
    frozen: bool
    batch_norm: bool
    labels: dict[str, np.ndarray]


def prepare_tasks(
    name: str, backbone: str, adapt: Adapt | None, *, width: int, image_size: int, max_length: int, seed: int
) -> Tasks:
    """Load a data set whose splits hold different classes, and encode it for the backbone.

    Args:
        name: see ``jtl.data.load_classes``.
        backbone: ``conv4`` or ``resnet12``, from scratch; or a pretrained model.
        adapt: of a pretrained model: ``head`` for a network of one hidden layer on its frozen features, ``lora`` or
            ``all``; None for ``head``, and from scratch ``all``.
        width: filters of conv4.
        image_size: side of the images that conv4 and resnet12 see.
        max_length: longest text in tokens.
        seed: of the split of classes, where the data set has none.

    Raises ValueError if the backbone reads another kind of data, or has nothing pretrained to keep.
    """
    dataset = data.load_classes(name, seed=seed)
    if backbone in SCRATCH:
        if dataset.kind != "image":
            raise InputError(f"--backbone {backbone} reads images, but --data {name} holds texts: try minilm")
        if adapt not in (None, "all"):
            raise InputError(
                f"--adapt {adapt} keeps pretrained weights, and {backbone} has none: choose a pretrained --backbone"
            )
        return _from_scratch(dataset, backbone, width, image_size)
    body = classification.body(backbone)
    reads = "image" if hasattr(body.config, "image_size") else "text"
    if reads != dataset.kind:
        raise InputError(f"--backbone {backbone} reads {reads}s, but --data {name} holds {dataset.kind}s")
    encoded = {s: _encode(backbone, reads, source, max_length) for s, source in dataset.splits.items()}
    if adapt in (None, "head"):
        return _on_frozen(dataset, backbone, body, encoded, max_length)
    return _whole(dataset, body, adapt, encoded)


def episode(batch: Any) -> Any:
    """``batch`` with images of bytes as numbers in [−1, 1]."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / 127.5 - 1 if x.dtype == jnp.uint8 else x, batch)


def turned(image: Array, turns: Array) -> Array:
    """Square images (..., H, H, C), each turned by so many quarters, ``turns`` (...)."""
    found = image
    for k in (1, 2, 3):
        own = jnp.rot90(image, k, (-3, -2))
        found = jnp.where(turns[..., None, None, None] == k, own, found)
    return found


def pooled(arrays: dict[str, Any], label: np.ndarray) -> episodes.Pool:
    """A pool of all the classes of ``label``."""
    return episodes.pool(arrays, label, np.unique(label).tolist())


def _from_scratch(dataset: data.Dataset, backbone: str, width: int, size: int) -> Tasks:
    grey = dataset.splits["train"][0]["image"].shape[-1] == 1
    channels = 1 if grey else 3
    how = image.Preprocess(size=(size, size), mean=(0.5,) * channels, std=(0.5,) * channels)
    pixels, labels = {}, {}
    for split, source in dataset.splits.items():
        part = image.prepare(source, how)
        assert part.pixels is not None
        pixels[split], labels[split] = part.pixels, _counted(part.labels)
    module = meta.PatchConv4(width, strided=size < 40) if backbone == "conv4" else meta.PatchResNet12()
    blank = jnp.zeros((2, size, size, channels))
    outputs, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), blank)
    return Tasks(
        name=dataset.name,
        pools={split: pooled({"image": pixels[split]}, labels[split]) for split in SPLITS},
        start=lambda key: linen(module, jax.jit(module.init)(key, blank)),
        width=outputs["features"].shape[-1],
        trained=TRAINED["all"],
        frozen=False,
        batch_norm=True,
        labels=labels,
    )


def _encode(backbone: str, reads: str, source: data.Source, max_length: int) -> Any:
    if reads == "text":
        tokenizer = pretrained.tokenizer(backbone)
        return text.encode(source, tokenizer, min(max_length, tokenizer.model_max_length))
    return image.prepare(source, image.Preprocess(**pretrained.image_processor(backbone)))


def _on_frozen(
    dataset: data.Dataset, backbone: str, body: Model, encoded: dict[str, Any], max_length: int
) -> Tasks:
    """Features of the frozen model, standardised by those of the training classes; each is computed once."""
    rows, labels = {}, {}
    for split, part in encoded.items():
        key = features.DataKey(
            f"{dataset.name}, classes of {split}", split, part.fingerprint,
            {"backbone": backbone, "max_length": max_length},
        )  # fmt: skip
        batches = loader.Batches(part, 64, train=False, buckets=part.buckets)
        found = features.cached(body, batches, key, ("features",))
        rows[split], labels[split] = found["features"], _counted(found["label"])
    centre, scale = rows["train"].mean(0), rows["train"].std(0)
    scale = np.maximum(scale, features.probes.LEAST_SPREAD * np.sqrt(np.mean(scale**2)))
    module = MLP((HIDDEN,))
    inputs = rows["train"].shape[-1]
    return Tasks(
        name=dataset.name,
        pools={
            split: pooled({"x": ((rows[split] - centre) / scale).astype(np.float32)}, labels[split])
            for split in SPLITS
        },
        start=lambda key: linen(module, jax.jit(module.init)(key, jnp.zeros((1, inputs)))),
        width=HIDDEN,
        trained=TRAINED["all"],
        frozen=True,
        batch_norm=False,
        labels=labels,
    )


def _whole(dataset: data.Dataset, body: Model, adapt: str, encoded: dict[str, Any]) -> Tasks:
    """The pretrained model itself, in every forward."""
    arrays, labels = {}, {}
    for split, part in encoded.items():
        length = (
            1 if dataset.kind == "image" else int(np.max([one.lengths.max() for one in encoded.values()]))
        )
        batch = part.batch(np.arange(len(part)), length)
        labels[split] = _counted(batch["label"])
        arrays[split] = {name: array for name, array in batch.items() if name != "label"}
    return Tasks(
        name=dataset.name,
        pools={split: pooled(arrays[split], labels[split]) for split in SPLITS},
        start=partial(_lora, body) if adapt == "lora" else lambda key: body,
        width=body.config.width("features"),
        trained=TRAINED[adapt],
        frozen=False,
        batch_norm="batch_stats" in body.variables,
        labels=labels,
    )


def _lora(body: Model, key: Array) -> Model:
    return adapters.lora(body, rank=4, where=".*/(query|value)", key=key)


def _counted(label: np.ndarray) -> np.ndarray:
    return np.unique(label, return_inverse=True)[1].astype(np.int32)
