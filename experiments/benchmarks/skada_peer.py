"""skada (torch) as ``experiments.benchmarks.domain`` measures it: its trainer, from the same parameters as jtl's.

The discriminator is ours because that of skada 0.6.0 ends in a softmax over its single output, which is 1 whatever the
features, so that its gradient is 0.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from experiments.domain_adaptation.domains import CONV4_WIDTH, DomainPair
from experiments.domain_adaptation.methods import HIDDEN
from jtl import tree
from jtl.data.batches.loader import Encoded
from jtl.model import Model
from jtl.tasks import accuracy

MODULES = {
    "head/out": "base_module_.head",
    "discriminator/dense_0": "domain_classifier_.classifier.0",
    "discriminator/out": "domain_classifier_.classifier.2",
}


def net_of(
    model: Model,
    method: str,
    *,
    seed: int,
    learning_rate: float,
    batch_size: int,
    decay: float,
    reversal: float,
) -> Any:
    """skada's trainer, with the very leaves of ``model``."""
    import torch
    from skada import deep
    from skada.deep.modules import DomainClassifier

    torch.manual_seed(seed)  # of the order of examples
    leaves = {name: torch.tensor(leaf) for name, leaf in named(model.params).items()}
    network = _network(classes=len(leaves["base_module_.head.bias"]))
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW, "optimizer__weight_decay": decay, "lr": learning_rate,
        "batch_size": batch_size, "max_epochs": 1, "train_split": None, "verbose": 0,
    }  # fmt: skip
    if method == "coral":
        net = deep.DeepCoral(network, "head", **options)
    else:
        # Its reversal, with other layers behind.
        discriminator = DomainClassifier(CONV4_WIDTH, alpha=reversal)
        (hidden,) = HIDDEN
        discriminator.classifier = torch.nn.Sequential(
            torch.nn.Linear(CONV4_WIDTH, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)
        )
        options |= {"domain_classifier": discriminator, "domain_criterion": torch.nn.BCEWithLogitsLoss()}
        net = deep.DANN(network, "features", **options)
    net.initialize()
    net.module_.load_state_dict({**net.module_.state_dict(), **leaves})
    return net


def _network(classes: int) -> Any:
    """``jtl.models.conv4.Conv4`` and its classifier in torch."""
    from torch import nn

    layers: dict[str, nn.Module] = {}
    for i in range(4):
        layers[f"conv_{i}"] = nn.Conv2d(3 if i == 0 else CONV4_WIDTH, CONV4_WIDTH, 3, padding=1, bias=False)
        layers[f"norm_{i}"] = nn.BatchNorm2d(CONV4_WIDTH, eps=1e-5, momentum=0.01)  # Flax's 0.99
        layers[f"relu_{i}"], layers[f"pool_{i}"] = nn.ReLU(), nn.MaxPool2d(2)
    layers["features"] = nn.Flatten()
    layers["head"] = nn.Linear(CONV4_WIDTH, classes)
    return nn.Sequential(OrderedDict(layers))


def named(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by their names and in their layouts in skada's module."""
    found = {}
    for path, leaf in tree.flatten(params).items():
        module, name = path.rsplit("/", 1)
        module = MODULES.get(module, f"base_module_.{module}")
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        name = "bias" if name == "bias" else "weight"
        found[f"{module}.{name}"] = np.ascontiguousarray(np.transpose(leaf, axes))
    return found


def _images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def tensors(batch: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """A batch as skada's module takes it, which knows target rows by a number below 0, and its labels."""
    import torch

    x = {
        "X": _images(batch["image"]),
        "sample_domain": torch.from_numpy(np.where(batch["domain"] == 0, 1, -2)),
    }
    return x, torch.from_numpy(batch["label"]).long()


def dataset_of(pair: DomainPair) -> Any:
    """All training examples, those of the target without labels."""
    from skada.deep.base import DeepDADataset

    own, other = (
        split.batch(np.arange(len(split)), 1, None) for split in (pair.source["train"], pair.target["train"])
    )
    return DeepDADataset(
        _images(np.concatenate([own["image"], other["image"]])),
        np.concatenate([own["label"].astype(np.int64), np.full(len(other["label"]), -1)]),
        np.repeat([1, -2], [len(own["label"]), len(other["label"])]),
    )


def timed_updates(net: Any, batches: Sequence[tuple[dict[str, Any], Any]]) -> float:
    """Seconds of a bare loop over skada's module, loss and optimiser."""
    module, optimizer = net.module_.train(), net.optimizer_
    began = time.monotonic()
    for x, label in batches:
        loss = net.criterion_(module(**x), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - began


def accuracy_of(net: Any, split: Encoded) -> float:
    """Accuracy of skada's network."""
    import torch

    rows = split.batch(np.arange(len(split)), 1, None)
    with torch.no_grad():
        logits = net.module_.base_module_.eval()(_images(rows["image"]))
    return accuracy(logits.numpy(), rows["label"])
