"""A feature pyramid on a pretrained backbone, with heads for object detection and semantic segmentation.

The pyramid is Lin et al. 2017, "Feature Pyramid Networks for Object Detection", https://arxiv.org/abs/1612.03144. The
detection head is FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355, figure 2), narrower and shallower by
default, with group norm in its towers as in its released code. The segmentation head is the semantic branch of Kirillov
et al. 2019, "Panoptic Feature Pyramid Networks", https://arxiv.org/abs/1901.02446, figure 3, with each level upsampled
in one step.

A detector is ``detector(jtl.load("efficientnet-lite0"), classes=10, key=key)``; its loss and decoding are in
``jtl.tasks.detect``. A segmenter is ``segmenter(...)``; its losses are in ``jtl.tasks.segment``. New leaves are under
``params["head"]``; the backbone keeps its paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl import heads
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

DETECT = (8, 16, 32)  # strides of the levels
SEGMENT = (2, 4, 8, 16, 32)
GROUPS = 8  # of every group norm

Maps = tuple[Float[Array, "B _ _ _"], ...]


def stages(config: Any) -> dict[int, str]:
    """Return the path of the last module of each stride, for taps: ``{4: "encoder/stage_0", ...}``.

    Raises:
        ValueError: the architecture has no stages of known strides.
    """
    found, stride = {}, 2
    if hasattr(config, "blocks"):  # EfficientNet-Lite, behind a stem of stride 2
        for i, block in enumerate(config.blocks):
            stride *= block.stride
            found[stride] = f"layer_{i}"
        return found
    if hasattr(config, "strides"):  # ResNet, behind a stem of stride 4
        for i, shrinks in enumerate(config.strides()):
            stride = (4 if i == 0 else stride) * shrinks
            found[stride] = f"encoder/stage_{i}"
        return found
    if hasattr(config, "hidden_sizes") and hasattr(config, "patch_size"):  # ConvNeXt
        return {config.patch_size * 2**i: f"encoder/stage_{i}" for i in range(len(config.hidden_sizes))}
    raise InputError(
        f"{type(config).__name__} has no stages of known strides: take an EfficientNet-Lite, a ResNet or a ConvNeXt"
    )


@dataclass(frozen=True)
class Stages:
    """The technique behind ``with_stages``."""

    paths: tuple[str, ...]

    def wrap(self, forward: Forward) -> Forward:
        """Return ``forward`` with the output ``stages``."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            taps = tuple(dict.fromkeys((*mode.taps, *self.paths)))
            outputs, state = forward(variables, batch, replace(mode, taps=taps), key)
            return {**outputs, "stages": tuple(outputs["taps"][path] for path in self.paths)}, state

        return run


def with_stages(model: Model, strides: Sequence[int]) -> Model:
    """Return ``model`` with one more output, ``stages``: its feature maps of these strides, finest first.

    Raises:
        ValueError: the architecture has no map of such a stride.
    """
    known = stages(model.config)
    if lacking := [stride for stride in strides if stride not in known]:
        raise InputError(
            f"strides={tuple(strides)}: the model has no map of stride {lacking[0]}; it has {sorted(known)}"
        )
    technique = Stages(tuple(known[stride] for stride in sorted(strides)))
    return model.replace(techniques=(*model.techniques, technique))


def _conv(features: int, size: int, name: str, std: float | None = None, bias: float = 0.0) -> nn.Conv:
    init = (
        nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        if std is None
        else nn.initializers.normal(std)
    )
    constant = nn.initializers.constant(bias)
    return nn.Conv(features, (size, size), kernel_init=init, bias_init=constant, name=name)


class Tower(nn.Module):
    """3 x 3 convolutions of one width, each with group norm and ReLU: (B, H, W, C) to (B, H, W, width)."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Apply them."""
        for i in range(self.depth):
            x = nn.relu(nn.GroupNorm(GROUPS, name=f"norm_{i}")(_conv(self.width, 3, f"conv_{i}")(x)))
        return x


class FeaturePyramid(nn.Module):
    """Converts a backbone's maps, finest first, to maps of one width that all carry information from coarser ones.

    Each map goes through a 1 x 1 convolution, the next coarser map is added at doubled size (by repetition), and the
    sum goes through a 3 x 3 convolution.
    """

    width: int

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Merge the maps; each must be half as large as the one before, rounded up."""
        merged: list[Array] = []
        for i in reversed(range(len(maps))):
            x = _conv(self.width, 1, f"lateral_{i}")(maps[i])
            if merged:
                x = x + merged[0].repeat(2, 1).repeat(2, 2)[:, : x.shape[1], : x.shape[2]]
            merged.insert(0, x)
        return tuple(_conv(self.width, 3, f"smooth_{i}")(x) for i, x in enumerate(merged))


class DetectionHead(nn.Module):
    """A pyramid, and for each of its cells class logits, distances to the edges of a bounding box, and centerness.

    ``jtl.tasks.detect`` describes the outputs. Two convolutional towers are shared by all levels; a learned scale per
    level multiplies its distances, which are in units of the stride before.

    Attributes:
        classes: C.
        strides: of the maps, finest first.
        width: channels of pyramid and towers, a multiple of 8.
        depth: convolutions of a tower (the paper has 4, of width 256).
    """

    classes: int
    strides: tuple[int, ...] = DETECT
    width: int = 64
    depth: int = 2

    @nn.compact
    def __call__(self, x: Maps, *, train: bool = False) -> dict[str, Array]:
        """Read the maps ``x``."""
        maps = FeaturePyramid(self.width, name="pyramid")(x)
        class_tower, box_tower = (Tower(self.width, self.depth, name=f"{n}_tower") for n in ("class", "box"))
        rare = -math.log(99.0)  # initially every class has probability 0.01, as in the focal-loss paper
        class_out = _conv(self.classes, 3, "class_out", 0.01, rare)
        box_out, centre_out = _conv(4, 3, "box_out", 0.01), _conv(1, 3, "centerness_out", 0.01)
        scales = self.param("scales", nn.initializers.ones, (len(maps),))
        most = math.log(1e3)  # keeps distances finite after a bad update

        logits, distances, centerness = [], [], []
        for i, level in enumerate(maps):
            box = box_tower(level)
            logits.append(_rows(class_out(class_tower(level))))
            distances.append(self.strides[i] * jnp.exp(jnp.minimum(scales[i] * _rows(box_out(box)), most)))
            centerness.append(_rows(centre_out(box))[..., 0])
        return {
            "cells": jnp.asarray(cells([level.shape[1:3] for level in maps], self.strides)),
            "class_logits": jnp.concatenate(logits, 1),
            "distances": jnp.concatenate(distances, 1),
            "centerness": jnp.concatenate(centerness, 1),
        }


def _rows(x: Float[Array, "B H W C"]) -> Float[Array, "B L C"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def cells(shapes: Sequence[tuple[int, ...]], strides: Sequence[int]) -> Float[np.ndarray, "L 3"]:
    """Return centre x, centre y and stride, in pixels, of every cell of maps of these heights and widths, row by row.

    >>> cells([(1, 2), (1, 1)], (4, 8)).tolist()
    [[2.0, 2.0, 4.0], [6.0, 2.0, 4.0], [4.0, 4.0, 8.0]]
    """
    parts = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = np.mgrid[:height, :width].reshape(2, -1)
        parts.append(np.column_stack([(x + 0.5) * stride, (y + 0.5) * stride, np.full(len(x), stride)]))
    return np.concatenate(parts).astype(np.float32)


class PixelHead(nn.Module):
    """A pyramid, and from all its levels together the class logits of every pixel.

    Each level goes through a convolution and is resized to the finest; their sum gives the logits, which are resized to
    the image (both bilinear).

    Attributes:
        classes: C.
        stride: of the finest map.
        width: channels, a multiple of 8.
    """

    classes: int
    stride: int = SEGMENT[0]
    width: int = 32

    @nn.compact
    def __call__(self, x: Maps, *, train: bool = False) -> dict[str, Array]:
        """Return ``pixel_logits`` (B, H, W, C); H and W are those of the finest map times its stride."""
        maps = FeaturePyramid(self.width, name="pyramid")(x)
        finest = maps[0].shape
        total = jnp.zeros(finest)
        for i, level in enumerate(maps):
            total += jax.image.resize(Tower(self.width, 1, name=f"level_{i}")(level), finest, "bilinear")
        logits = _conv(self.classes, 1, "out")(total)
        size = (finest[0], finest[1] * self.stride, finest[2] * self.stride, self.classes)
        return {"pixel_logits": jax.image.resize(logits, size, "bilinear")}


def detector(
    model: Model,
    classes: int,
    *,
    key: Array,
    strides: Sequence[int] = DETECT,
    width: int = 64,
    depth: int = 2,
    params: dict[str, Any] | None = None,
) -> Model:
    """Return ``model`` with a pyramid and a new ``DetectionHead`` under ``params["head"]``.

    Args:
        model: an EfficientNet-Lite, a ResNet or a ConvNeXt.
        classes: number of object classes, without background.
        key: random key for the initialisation.
        strides: of the levels, each twice the one before.
        width: see ``DetectionHead``.
        depth: see ``DetectionHead``.
        params: the head's leaves, if it was trained before.
    """
    return _attach(model, DetectionHead(classes, tuple(sorted(strides)), width, depth), strides, key, params)


def segmenter(
    model: Model,
    classes: int,
    *,
    key: Array,
    strides: Sequence[int] = SEGMENT,
    width: int = 32,
    params: dict[str, Any] | None = None,
) -> Model:
    """Return ``model`` with a pyramid and a new ``PixelHead`` under ``params["head"]``.

    Args:
        model: see ``detector``.
        classes: number of classes.
        key: random key for the initialisation.
        strides: of the levels; those of which the model has no map are left out (a ResNet begins at 4).
        width: see ``PixelHead``.
        params: the head's leaves, if it was trained before.
    """
    known = stages(model.config)
    own = tuple(stride for stride in sorted(strides) if stride in known)
    return _attach(model, PixelHead(classes, own[0], width), own, key, params)


def _attach(
    model: Model,
    module: DetectionHead | PixelHead,
    strides: Sequence[int],
    key: Array,
    params: dict[str, Any] | None,
) -> Model:
    if module.classes < 1:
        raise InputError(f"classes must be at least 1, got {module.classes}")
    model = with_stages(model, strides)
    if params is None:
        side = 2 * max(strides)
        image = jnp.zeros((1, side, side, model.config.num_channels))
        maps = jax.eval_shape(lambda model: model({"image": image})["stages"], model)
        init = jax.jit(lambda key: module.init(key, tuple(jnp.zeros(x.shape) for x in maps)))
        params = init(key)["params"]
    return heads.attach(model, module, on="stages", params=params)
