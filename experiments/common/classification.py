"""A pretrained model and a data set made ready for each other: what every arm of a comparison starts from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jtl import data, features, heads, pretrained
from jtl.data import image, text
from jtl.data.batches.loader import Batches
from jtl.errors import InputError
from jtl.model import Model
from jtl.outputs import predict
from jtl.tasks import accuracy

QUICK_LENGTH = 40  # tokens of a text, with --quick


@dataclass(frozen=True)
class Classification:
    """A pretrained model and a data set made ready for it.

    Attributes:
        model_name: what the model was loaded by.
        pretrained: the model without a head.
        dataset: the raw data, for names and for showing examples.
        splits: train, validation and test, encoded for the model.
        buckets: the padded lengths of all its batches, so that subsets and splits share compilations.
        preprocessing: how, for cache keys.
    """

    model_name: str
    pretrained: Model
    dataset: data.Dataset
    splits: dict[str, Any]
    buckets: tuple[int, ...]
    preprocessing: dict[str, Any]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.dataset.classes)

    def with_train(self, count: int | None, seed: int) -> Classification:
        """The task with ``count`` stratified training examples, nested over counts; None for all of them."""
        train = self.splits["train"]
        if count is None or count >= len(train):
            return self
        few = train.take(data.subset_indices(train.labels, count, seed))
        return replace(self, splits={**self.splits, "train": few})

    def key(self, split: str) -> features.DataKey:
        """What identifies a split in the cache of features."""
        return features.DataKey(self.dataset.name, split, self.splits[split].fingerprint, self.preprocessing)


def body(name: str) -> Model:
    """A pretrained model without the head of the task it was trained for."""
    model = pretrained.load(name)
    if heads.find(model) is None:
        return model
    kept = {child: leaves for child, leaves in model.params.items() if child != "head"}
    return model.with_params(kept).replace(techniques=())


def prepare_classification(
    model: str,
    dataset: str,
    *,
    max_length: int = 128,
    image_size: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    quick: bool = False,
    **columns: str | None,
) -> Classification:
    """Load a model and a data set, and tokenise or resize the data for the model.

    Args:
        model: see ``jtl.pretrained.load``.
        dataset: see ``jtl.data.load``.
        max_length: longest text in tokens.
        image_size: side in pixels; by default the model's own.
        validation: use so many validation examples (stratified); by default all.
        test: use so many test examples; by default all.
        quick: cut and pad all texts to one short length, so that each program compiles once.
        columns: of your own files, see ``jtl.data.load``.

    Raises:
        InputError: the model reads images and the data are texts, or the reverse.
    """
    loaded = data.load(dataset, "labels", **columns)
    trunk = body(model)
    reads = "image" if hasattr(trunk.config, "image_size") else "text"
    if reads != loaded.kind:
        raise InputError(
            f"--model {model} reads {reads}s, but --data {dataset} holds {loaded.kind}s: "
            f"choose {'an image' if reads == 'image' else 'a text'} data set or another model"
        )
    limits = {"validation": validation, "test": test}
    sources = dict(loaded.splits)
    splits: dict[str, Any]
    for split, limit in limits.items():
        if limit is not None and limit < len(sources[split]):
            sources[split] = data.subset(sources[split], limit, seed=0)
    if reads == "text":
        tokenizer = pretrained.tokenizer(model)
        longest = min(max_length, tokenizer.model_max_length, QUICK_LENGTH if quick else max_length)
        preprocessing: dict[str, Any] = {"tokenizer": model, "max_length": longest}
        known = getattr(trunk.config, "vocab_size", None)
        splits = {
            s: text.encode(source, tokenizer, longest, vocab_size=known) for s, source in sources.items()
        }
        lengths = np.concatenate([part.lengths for part in splits.values()])
        buckets = text.best_buckets(lengths, 1 if quick else text.SHAPES, longest)
    else:
        how = image.Preprocess(**pretrained.image_processor(model))
        how = how if image_size is None else how.resized(image_size)
        preprocessing = asdict(how)
        splits = {s: image.prepare(source, how) for s, source in sources.items()}
        buckets = splits["train"].buckets
    return Classification(model, trunk, replace(loaded, splits=sources), splits, buckets, preprocessing)


def batches(task: Classification, split: str, size: int = 64) -> Batches:
    """Every example of a split once, for measuring."""
    return Batches(task.splits[split], size, train=False, buckets=task.buckets)


def score(model: Model, task: Classification, split: str = "validation") -> float:
    """Accuracy on a split."""
    return accuracy(*predict(model, batches(task, split)))


def frozen(task: Classification, split: str, at: str = "features") -> tuple[np.ndarray, np.ndarray]:
    """An output of the pretrained model on a split, computed once and cached on disk, and the labels."""
    arrays = features.cached(task.pretrained, batches(task, split), task.key(split), (at,))
    return arrays[at], arrays["label"]
