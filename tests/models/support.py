"""What the tests of architectures share."""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.models.compare import error, outputs
from jtl.model import linen
from jtl.models import ARCHITECTURES
from jtl.tree import flatten, nest

__all__ = ["error", "from_files", "outputs", "shapes"]


def from_files(name, config, weights):
    """Our model of the settings and tensors of a folder; every tensor is used, or ignored on purpose."""
    architecture = ARCHITECTURES[name]
    ours = architecture.config.from_hf(config)
    weights = {architecture.canonical(key): value for key, value in weights.items()}
    ours = architecture.settle(ours, weights)
    if hasattr(ours, "pooler"):
        ours = dataclasses.replace(ours, pooler="pooler.dense.weight" in weights)
    tensors = architecture.tensors(ours)
    unused = set(weights) - {tensor.key for tensor in tensors.values()}
    assert all(architecture.is_ignored(key) for key in unused), unused
    values = {
        path: jnp.asarray(tensor.layout.to_jax(weights[tensor.key])) for path, tensor in tensors.items()
    }
    module = architecture.module(ours)
    assert {path: value.shape for path, value in values.items()} == shapes(architecture, ours)
    return linen(module, nest(values)).replace(config=ours)


def shapes(architecture, config):
    """The shape of every variable of the module, by path."""
    example = {name: jnp.asarray(value) for name, value in architecture.example(config).items()}
    variables = jax.eval_shape(lambda: architecture.module(config).init(jax.random.key(0), **example))
    return {path: leaf.shape for path, leaf in flatten(variables).items()}
