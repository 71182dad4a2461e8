"""A second-order MAML step in torch, in the two ways that ``experiments.benchmarks.maml`` measures."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from jtl import tree
from jtl.model import Model

WAYS, SIDE = 5, 28


def torch_layout(path: str, leaf: Any, pooling: bool) -> np.ndarray:
    """A leaf as torch has it, whose strided convolution pads an even side before it where "SAME" pads after it.

    So with strides torch gets everything upside down and from right to left: images, kernels and the head's rows.
    """
    leaf = np.asarray(leaf)
    turn = slice(None, None, None if pooling else -1)
    if leaf.ndim == 4:
        leaf = leaf[turn, turn].transpose(3, 2, 0, 1)
    elif path == "head/out/kernel":
        side = 1 if pooling else 2
        maps = leaf.reshape(side, side, -1, WAYS)[turn, turn]
        leaf = maps.transpose(3, 2, 0, 1).reshape(WAYS, -1)
    return np.ascontiguousarray(leaf)


def _leaves(model: Model, pooling: bool) -> dict[str, Any]:
    """The leaves of ``model`` in torch's layouts, by path."""
    import torch

    return {
        path: torch.tensor(torch_layout(path, leaf, pooling), requires_grad=True)
        for path, leaf in tree.flatten(model.params).items()
    }


def _torch_batch(batch: Any, pooling: bool) -> dict[str, tuple[Any, Any]]:
    import torch

    turn = slice(None, None, None if pooling else -1)
    return {
        name: (
            torch.from_numpy(part["image"][:, :, turn, turn].transpose(0, 1, 4, 2, 3).copy()),
            torch.from_numpy(part["label"]).long(),
        )
        for name, part in batch.items()
    }


def _loss(leaves: dict[str, Any], image: Any, label: Any, *, pooling: bool) -> Any:
    """``Classify(stats="batch")`` of Conv4 and its head."""
    import torch.nn.functional as F

    x = image
    for i in range(4):
        x = F.conv2d(x, leaves[f"conv_{i}/kernel"], padding=1, stride=1 if pooling else 2)
        x = F.batch_norm(x, None, None, leaves[f"norm_{i}/scale"], leaves[f"norm_{i}/bias"], training=True)
        x = F.max_pool2d(F.relu(x), 2) if pooling else F.relu(x)
    logits = F.linear(x.flatten(1), leaves["head/out/kernel"], leaves["head/out/bias"])
    return F.cross_entropy(logits, label)


class Peer:
    """A torch implementation: called, it takes one step."""

    def __init__(self, model: Model, batch: Any, *, inner_steps: int, rate: float, pooling: bool) -> None:
        import torch

        self.leaves, self.inner_steps, self.rate = _leaves(model, pooling), inner_steps, rate
        self.batch = _torch_batch(batch, pooling)
        self.loss = partial(_loss, pooling=pooling)
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=1e-3)

    def gradient(self) -> None:
        """Adds the meta-gradient to the leaves' ``grad``."""
        raise NotImplementedError

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.gradient()
        self.optimizer.step()


class Functional(Peer):
    """torch.func: one program over all tasks."""

    def gradient(self) -> None:
        """Of the mean over tasks."""
        from torch.func import grad, vmap

        def task(leaves: Any, support: Any, known: Any, query: Any, asked: Any) -> Any:
            for _ in range(self.inner_steps):
                slope = grad(self.loss)(leaves, support, known)
                leaves = {name: leaf - self.rate * slope[name] for name, leaf in leaves.items()}
            return self.loss(leaves, query, asked)

        def mean(leaves: Any) -> Any:
            over = (None, 0, 0, 0, 0)
            return vmap(task, over)(leaves, *self.batch["support"], *self.batch["query"]).mean()

        found = grad(mean)({name: leaf.detach() for name, leaf in self.leaves.items()})
        for name, leaf in self.leaves.items():
            leaf.grad = found[name]


class Loop(Peer):
    """One task after another."""

    def gradient(self) -> None:
        """Of one task after another."""
        import torch

        tasks = len(self.batch["query"][1])
        for t in range(tasks):
            (support, known), (query, asked) = (
                tuple(x[t] for x in self.batch[part]) for part in ("support", "query")
            )
            adapted = dict(self.leaves)
            for _ in range(self.inner_steps):
                slopes = torch.autograd.grad(
                    self.loss(adapted, support, known), list(adapted.values()), create_graph=True
                )
                adapted = {
                    name: leaf - self.rate * slope
                    for (name, leaf), slope in zip(adapted.items(), slopes, strict=True)
                }
            (self.loss(adapted, query, asked) / tasks).backward()
