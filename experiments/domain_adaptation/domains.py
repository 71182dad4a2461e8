"""A source and a target domain made ready for one network: what every method of domain adaptation starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common import classification
from jtl import data, features, heads
from jtl.data import image
from jtl.data.batches.loader import Encoded
from jtl.errors import InputError
from jtl.model import Model, linen
from jtl.models.conv4 import Conv4
from jtl.models.mlp import MLP

DIGIT = image.Preprocess(size=(28, 28), mean=(0.5,) * 3, std=(0.5,) * 3)
CONV4_WIDTH, BOTTLENECK = 32, 128


@dataclass(frozen=True)
class DomainPair:
    """A source and a target made ready for one network.

    Attributes:
        name: of the task.
        start: from a random key to a network with a new classifier.
        source: encoded splits.
        target: encoded splits.
        classes: their names.
        buckets: padded lengths of texts, None for one shape.
        stats: how the network normalises while training.
        width: size of its features.
        rate: usual learning rate.
        steps: usual number of updates.
    """

    name: str
    start: Callable[[Array], Model]
    source: dict[str, Encoded]
    target: dict[str, Encoded]
    classes: tuple[str, ...]
    buckets: tuple[int, ...] | None
    stats: Literal["running", "batch"]
    width: int
    rate: float
    steps: int


def prepare_domains(
    name: str,
    source: str,
    target: str,
    *,
    model: str | None = None,
    frozen: bool = False,
    max_length: int = 64,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> DomainPair:
    """Load both domains and encode them for the network.

    Args:
        name: of the task.
        source: a data set; see ``jtl.data.load``.
        target: another of the same classes.
        model: ``conv4``, or a pretrained model; None for conv4 on images and the frozen ``minilm`` on texts.
        frozen: train a network of one hidden layer on the model's frozen features.
        max_length: longest text in tokens.
        train: use so many training examples of each domain; by default all.
        validation: use so many validation examples.
        test: use so many test examples.

    Raises ValueError if they differ in kind or in classes.
    """
    loaded = data.load(source), data.load(target)
    kinds, classes = {d.kind for d in loaded}, {d.classes for d in loaded}
    if len(kinds) > 1:
        raise InputError(f"--source {source} holds {loaded[0].kind}s, --target {target} {loaded[1].kind}s")
    if len(classes) > 1:
        raise InputError(
            f"source and target must have the same classes in the same order: {source} has {loaded[0].classes}, "
            f"{target} {loaded[1].classes}"
        )
    limits = {"train": train, "validation": validation, "test": test}
    if model in (None, "conv4") and loaded[0].kind == "image":
        if frozen:
            raise InputError(
                "--frozen needs a pretrained --model: conv4 has no features before it is trained"
            )
        own, other = (_images(d, limits) for d in loaded)
        return DomainPair(name, _conv4(len(loaded[0].classes)), own, other, loaded[0].classes, None, "batch",
                        CONV4_WIDTH, 2e-3, 1000)  # fmt: skip
    ready = [
        classification.prepare_classification(
            model or "minilm", d, max_length=max_length, validation=validation, test=test
        ).with_train(train, 0)
        for d in (source, target)
    ]
    first = ready[0]
    if frozen or model is None:
        own, other = (_frozen(part, first) for part in ready)
        width = own["train"].batch(np.array([0]), 1, None)["x"].shape[-1]
        return DomainPair(name, _mlp(first.classes, width), own, other, first.dataset.classes, None, "running",
                        BOTTLENECK, 1e-3, 300)  # fmt: skip
    buckets = (
        max_length,
    )  # a batch of both domains is as long as its longest text: one shape serves as well
    start = partial(_whole, first.pretrained, first.classes)
    stats: Literal["running", "batch"] = "batch" if "batch_stats" in first.pretrained.variables else "running"
    return DomainPair(name, start, ready[0].splits, ready[1].splits, first.dataset.classes,
                    buckets if first.dataset.kind == "text" else None, stats,
                    first.pretrained.config.width("features"), 1e-4, 150)  # fmt: skip


def _images(dataset: data.Dataset, limits: Mapping[str, int | None]) -> dict[str, Encoded]:
    splits: dict[str, Encoded] = {}
    for split, source in dataset.splits.items():
        limit = limits.get(split)
        few = source if limit is None or limit >= len(source) else data.subset(source, limit, seed=0)
        encoded = image.prepare(few, DIGIT)
        assert encoded.pixels is not None
        splits[split] = replace(
            encoded, pixels=np.broadcast_to(encoded.pixels, (*encoded.pixels.shape[:3], 3))
        )
    return splits


def _frozen(part: classification.Classification, source: classification.Classification) -> dict[str, Encoded]:
    """Features of the frozen model, standardised by the source's training examples."""
    x, _ = classification.frozen(source, "train")
    centre, scale = x.mean(0), np.maximum(x.std(0), features.probes.LEAST_SPREAD * np.sqrt(np.mean(x.var(0))))
    splits: dict[str, Encoded] = {}
    for split in data.dataset.SPLITS:
        rows, label = classification.frozen(part, split)
        splits[split] = data.Arrays({"x": ((rows - centre) / scale).astype(np.float32), "label": label})
    return splits


def _conv4(classes: int) -> Callable[[Array], Model]:
    def start(key: Array) -> Model:
        module = Conv4(CONV4_WIDTH)
        model = linen(module, jax.jit(module.init)(key, jnp.zeros((2, 28, 28, 3))))
        return heads.classifier(model, classes, key=key, on="features", width=CONV4_WIDTH)

    return start


def _mlp(classes: int, inputs: int) -> Callable[[Array], Model]:
    def start(key: Array) -> Model:
        module = MLP((BOTTLENECK,))
        model = linen(module, jax.jit(module.init)(key, jnp.zeros((1, inputs))))
        return heads.classifier(model, classes, key=key, on="features", width=BOTTLENECK)

    return start


def _whole(body: Model, classes: int, key: Array) -> Model:
    return heads.classifier(body, classes, key=key, on="features")
