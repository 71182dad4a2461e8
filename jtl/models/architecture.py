"""What the loader needs to know about an architecture: its module, its configuration and its name map.

Every architecture file ends with an ``Architecture``. For each variable of the Flax module, its ``tensors(config)``
names the tensor of a Hugging Face file and how the two layouts relate.
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
    """The layout of a tensor in a torch file relative to jtl's: a permutation of axes, exactly invertible."""

    name: str
    axes: tuple[int, ...] | None  # jtl's = file.transpose(axes); None: same layout, any rank

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Convert from the file's layout to jtl's.

        Raises:
            ValueError: the rank does not fit.
        """
        return array if self.axes is None else self._check(array).transpose(self.axes)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Convert from jtl's layout to the file's: the inverse of ``to_jax``."""
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
    """One tensor of a file: its key without the task prefix (``bert.``), and its layout."""

    key: str
    layout: Layout = PLAIN


@dataclasses.dataclass(frozen=True, eq=False)
class HeadSpec:
    """The classification head that ``transformers`` puts on an architecture.

    Attributes:
        on: the output it reads.
        tensors: for each layer, its key prefix in the file, without the task prefix.
        task_class: the class written to ``architectures`` in config.json.
        hidden: whether a ``dense`` layer and ``activation`` come before ``out``.
        activation: after ``dense``.
        dropout: the layers with dropout in front, at the rate ``config.head_dropout``.
        bias: whether its layers have a bias.
        width: of ``dense``; None for that of its input.
        output: name of its output.
        unused: regex of variables that ``task_class`` has no place for.
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
    """An architecture: Flax module, configuration, and the conversion from and to Hugging Face files.

    Attributes:
        name: ``model_type`` in config.json.
        config: frozen dataclass with ``from_hf``, ``to_hf``, ``head`` (a ``HeadSpec``) and ``width(output)``, the size
            of that output's last axis.
        module: the Flax module.
        tensors: from the configuration to the name map: variable path with its collection
            (``params/encoder/layer_0/...``) to ``Tensor``.
        prefix: what files of task models put before these keys.
        head: the standard classification head.
        example: from the configuration to a smallest batch, for tracing the module.
        base_class: the ``transformers`` class of the bare encoder.
        ignored: regexes (full match, canonical key) of file keys that are not needed, if no variable uses them.
        renames: regexes and replacements that turn other spellings of a key into that of ``tensors``.
        in_memory: those that turn a module's path into the one that ``transformers`` v5 uses in memory.
        aliases: from the configuration to spellings that depend on the dimensions, by the key of ``tensors``.
        spans: the head for extractive question answering, if ``transformers`` has one: see ``jtl.tasks.spans``.
        settle: returns the configuration of a file from that of config.json and the file's canonical keys, where
            config.json does not say everything.
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
        """Return the key as ``tensors`` and ``ignored`` spell it: task prefix removed, other spellings renamed."""
        key = key.removeprefix(self.prefix)
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def is_ignored(self, key: str) -> bool:
        """Return whether a canonical file key is not needed."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def span_spec(task_class: str, unused: str | None = None) -> HeadSpec:
    """Return the head for extractive question answering, the same for all encoders: two scores per token.

    Args:
        task_class: see ``HeadSpec``.
        unused: see ``HeadSpec``.
    """
    return HeadSpec("sequence", {"out": "qa_outputs"}, task_class, output="span_logits", unused=unused)


def linear(path: str, key: str, *, bias: bool = True) -> dict[str, Tensor]:
    """Name map of a Dense layer at ``path``, stored as torch Linear ``key``."""
    kernel = {f"params/{path}/kernel": Tensor(f"{key}.weight", LINEAR)}
    return kernel | ({f"params/{path}/bias": Tensor(f"{key}.bias")} if bias else {})


def norm(path: str, key: str) -> dict[str, Tensor]:
    """Name map of a LayerNorm at ``path``, stored as torch LayerNorm ``key``."""
    return {f"params/{path}/scale": Tensor(f"{key}.weight"), f"params/{path}/bias": Tensor(f"{key}.bias")}


def batch_norm(path: str, key: str) -> dict[str, Tensor]:
    """Name map of a BatchNorm at ``path`` with its running statistics, stored as torch BatchNorm2d ``key``."""
    return norm(path, key) | {
        f"batch_stats/{path}/mean": Tensor(f"{key}.running_mean"),
        f"batch_stats/{path}/var": Tensor(f"{key}.running_var"),
    }


def from_hf(cls: type, config: Mapping[str, Any], *, model_type: str, only: Mapping[str, tuple] = {}) -> Any:
    """Build a configuration from the settings in a config.json that have the names of its fields.

    Args:
        cls: the configuration's class.
        config: the content of config.json.
        model_type: the expected one.
        only: supported values of settings that change the computation but are not fields; a missing setting is fine.

    Raises:
        ValueError: another ``model_type``, an unsupported value, or values that ``cls`` refuses.
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
    """Check that the number of attention heads divides the hidden size.

    Raises:
        ValueError: it does not.
    """
    if heads < 1 or hidden % heads:
        raise InputError(f"hidden size {hidden} is not a multiple of the number of attention heads, {heads}")
