"""Image preprocessing of pretrained models, from their ``preprocessor_config.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jtl.errors import InputError
from jtl.pretrained.load import find_architecture
from jtl.pretrained.sources import SHORT_NAMES, read_config, resolve

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic")  # in PIL's numbering
FILE = "preprocessor_config.json"
CROPPED = 384  # for smaller sides ConvNextImageProcessor crops; from this size on it warps


def image_processor(name: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Return the arguments of ``jtl.data.image.Preprocess`` for a model; only JSON is read.

    Where the file asks for a crop from a resized square, the crop is taken from an image whose *shorter* side has the
    square's length, as DeiT was evaluated; ``transformers`` resizes to the square first. A model of ``jtl.models``
    whose configuration has ``image_mean``, such as EfficientNet-Lite, needs no file.

    Args:
        name: as for ``jtl.load``.
        revision: of a hub id.

    Raises:
        FileNotFoundError: the model has no ``preprocessor_config.json``.
        ValueError: the file lacks a mean, a standard deviation or a size, or asks for something that ``Preprocess``
            cannot do.
        UnknownModelError, UnreachableHubError, WheelError: see ``resolve``.
    """
    folder = resolve(name, revision)
    settings = read_config(name, folder)
    file = folder / FILE
    short = SHORT_NAMES.get(os.fspath(name))
    if short and short.processor:
        return _arguments(file, dict(short.processor), settings)
    if not file.is_file():
        config = find_architecture(settings.get("model_type")).config.from_hf(settings)
        if hasattr(config, "image_mean"):
            side = config.image_size
            return {"size": (side, side), "mean": tuple(config.image_mean), "std": tuple(config.image_std)}
        raise FileNotFoundError(
            f"{folder} has no {FILE}, which says how its images are resized and normalised: copy that of the model "
            'from which it was made, or write one like {"size": {"height": 224, "width": 224}, '
            '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    return _arguments(file, found, settings)


def _arguments(file: Path, found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Preprocess`` for a preprocessor_config.json and the config.json beside it."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not found.get(step, True):
            raise InputError(f"{file}: {step} is false, and jtl always resizes and normalises")
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise InputError(
            f"{file}: rescale_factor is {found['rescale_factor']}, and jtl's images lie in [0, 1]: 1/255"
        )
    lacking = [key for key in ("image_mean", "image_std", "size") if found.get(key) is None]
    if lacking:
        raise InputError(f"{file} lacks {', '.join(lacking)}")
    square = settings.get("model_type") not in (
        "dinov2",
        "dinov2_with_registers",
    )  # the meaning of a bare number
    sides, shortest = _size(found["size"], square)
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type"))
    if kind.startswith(
        "ConvNext"
    ):  # also of ResNet: ``crop_pct`` is the share of the shorter side to keep, not a side to crop
        sides, shortest = _size(found["size"], True)[0], None
        if sides[0] < CROPPED:
            shortest = int(sides[0] / (found.get("crop_pct") or 224 / 256))
    elif found.get("do_center_crop", "crop_size" in found):
        shortest = shortest or min(sides)
        sides, _ = _size(found.get("crop_size", found["size"]), True)
    elif shortest is not None:
        sides = (shortest, shortest)  # without a crop images would differ in shape, so the centre is cropped
    resample = found.get("resample", 3 if kind.startswith("ConvNext") else 2)
    if resample not in range(len(RESAMPLE)):
        raise InputError(f"{file}: resample {resample!r} is not supported; 0 to 3 are {', '.join(RESAMPLE)}")
    return {
        "size": sides,
        "mean": tuple(found["image_mean"]),
        "std": tuple(found["image_std"]),
        "shortest": shortest,
        "resample": RESAMPLE[resample],
    }


def _size(size: Any, square: bool) -> tuple[tuple[int, int], int | None]:
    """Height and width, and the length of the shorter side if only that is given."""
    if isinstance(size, int):
        return (size, size), None if square else size
    if "shortest_edge" in size:
        return (size["shortest_edge"],) * 2, size["shortest_edge"]
    return (size["height"], size["width"]), None
