"""What the loader must know about an architecture: its module, its configuration and its name map.

Every file of this folder ends with an `Architecture`. Its `tensors(config)` names, for each variable of the
Flax module, the tensor of a Hugging Face file that holds it and how the two are laid out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from jtl.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of a torch file is laid out against ours: a permutation of axes, exactly invertible."""

    name: str
    axes: tuple[int, ...] | None  # ours = file.transpose(axes); None: the same layout, any rank

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """File layout to ours. Raises ValueError when the rank cannot be right."""
        return array if self.axes is None else self._check(array).transpose(self.axes)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Our layout to that of the file: the inverse of `to_jax`."""
        return array if self.axes is None else self._check(array).transpose(np.argsort(self.axes))

    def _check(self, array: np.ndarray) -> np.ndarray:
        if self.axes is not None and array.ndim != len(self.axes):
            raise InputError(
                f"{self.name} layout needs {len(self.axes)} axes, found shape {tuple(array.shape)}"
            )
        return array


PLAIN = Layout("PLAIN", None)
LINEAR = Layout("LINEAR", (1, 0))  # (out, in) to (in, out)
CONV = Layout("CONV", (2, 3, 1, 0))  # OIHW to HWIO
CONV_1D = Layout("CONV_1D", (2, 1, 0))  # OIW to WIO
DEPTHWISE = Layout("DEPTHWISE", (2, 3, 1, 0))  # (C*m, 1, kh, kw) to (kh, kw, 1, C*m), feature_group_count=C


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its key without the task prefix (`bert.`), and its layout."""

    key: str
    layout: Layout = PLAIN


@dataclasses.dataclass(frozen=True, eq=False)
class HeadSpec:
    """The classification head that `transformers` puts on this architecture.

    `on`: the output it reads. `hidden`: whether a `dense` layer and `activation` come before `out`.
    `tensors`: file key prefix of each layer, without the task prefix. `task_class`: the class written to
    `architectures` of config.json. `dropout`: the layers with dropout in front, at the rate
    `config.head_dropout`. `bias`: whether its layers have one. `width`: of `dense`; None for that of its input.
    `output`: the name of what it gives. `unused`: regex of variables that `task_class` has no place for.
    """

    on: str
    tensors: Mapping[str, str]
    task_class: str
    hidden: bool = False
    activation: str = "tanh"
    dropout: tuple[str, ...] = ()
    bias: bool = True
    width: int | None = None
    output: str = "logits"
    unused: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """An architecture: Flax module, configuration, and the way to and from Hugging Face files.

    `config`: frozen dataclass with `from_hf`, `to_hf`, `head` (a `HeadSpec`) and `width(output)`, the size of
    the last axis of that output.
    `tensors(config)`: variable path, with its collection (`params/encoder/layer_0/...`), to `Tensor`.
    `prefix`: what files of task models put before these keys.
    `example(config)`: a smallest batch, to trace the module with.
    `base_class`: the `transformers` class of the bare encoder.
    `ignored`: regexes (full match, canonical key) of file keys left out on purpose, if no variable uses them.
    `renames`: regexes and replacements that turn other spellings of a key into the one of `tensors`.
    `aliases(config)`: spellings that depend on the dimensions, to the key of `tensors`.
    `in_memory`: those that turn the path of a module into the one that transformers v5 holds in memory.
    `spans`: the head of question answering, if `transformers` has one: see `jtl.tasks.spans`.
    `settle`: makes of a configuration and the canonical keys of a file the configuration of that file, where
    config.json does not tell all.
    """

    name: str
    config: Any
    module: type[nn.Module]
    tensors: Callable[[Any], dict[str, Tensor]]
    prefix: str
    head: HeadSpec
    example: Callable[[Any], dict[str, np.ndarray]]
    base_class: str
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    in_memory: tuple[tuple[str, str], ...] = ()
    aliases: Callable[[Any], dict[str, str]] = lambda config: {}
    spans: HeadSpec | None = None
    settle: Callable[[Any, Collection[str]], Any] = lambda config, keys: config

    def canonical(self, key: str) -> str:
        """The key as `tensors` and `ignored` spell it: task prefix removed, other spellings renamed."""
        key = key.removeprefix(self.prefix)
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_ignored(self, key: str) -> bool:
        """Whether a canonical file key is left out on purpose."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def span_spec(task_class: str, unused: str | None = None) -> HeadSpec:
    """The head of extractive question answering, alike in all encoders: two scores of each token."""
    return HeadSpec("sequence", {"out": "qa_outputs"}, task_class, output="span_logits", unused=unused)


def linear(path: str, key: str, *, bias: bool = True) -> dict[str, Tensor]:
    """The two variables of a Dense layer at `path`, stored as torch Linear `key`."""
    kernel = {f"params/{path}/kernel": Tensor(f"{key}.weight", LINEAR)}
    return kernel | ({f"params/{path}/bias": Tensor(f"{key}.bias")} if bias else {})


def norm(path: str, key: str) -> dict[str, Tensor]:
    """The two variables of a LayerNorm at `path`, stored as torch LayerNorm `key`."""
    return {f"params/{path}/scale": Tensor(f"{key}.weight"), f"params/{path}/bias": Tensor(f"{key}.bias")}


def batch_norm(path: str, key: str) -> dict[str, Tensor]:
    """The parameters and running statistics of a BatchNorm at `path`, stored as torch BatchNorm2d `key`."""
    return norm(path, key) | {
        f"batch_stats/{path}/mean": Tensor(f"{key}.running_mean"),
        f"batch_stats/{path}/var": Tensor(f"{key}.running_var"),
    }


def from_hf(cls: type, config: Mapping[str, Any], *, model_type: str, only: Mapping[str, tuple] = {}) -> Any:
    """Build the configuration `cls` from the settings of a config.json that carry the names of its fields.

    `only` lists, for settings that change the computation but are no field, the values that mean what the
    module computes (a missing setting is fine). Raises ValueError for any other value, a wrong `model_type`,
    and for whatever `cls` refuses.
    """
    found = config.get("model_type", model_type)
    if found != model_type:
        raise InputError(f"config.json: model_type is {found!r}, expected {model_type!r}")
    for name, values in only.items():
        if name in config and config[name] not in values:
            raise InputError(
                f"config.json: {name}={config[name]!r} is not supported for {model_type}; "
                f"supported: {', '.join(map(repr, values))}"
            )
    picked: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value: Any = config.get(field.name)
        if value is not None:
            if isinstance(value, list):
                value = tuple(value)
            picked[field.name] = float(value) if isinstance(field.default, float) else value
    return cls(**picked)


def check_heads(hidden: int, heads: int) -> None:
    """Raise ValueError unless the attention heads divide the hidden size."""
    if heads < 1 or hidden % heads:
        raise InputError(f"hidden size {hidden} is not a multiple of the number of attention heads, {heads}")
