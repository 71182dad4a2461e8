"""The name and layout of each adapter leaf in PEFT's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from jtl.adapters.adalora import AdaLoRA
from jtl.adapters.dora import DoRA
from jtl.adapters.ia3 import IA3
from jtl.adapters.lora import LoRA
from jtl.adapters.site import Site, SiteError
from jtl.adapters.vera import VeRA

Exchanged = LoRA | IA3 | VeRA | AdaLoRA
EXCHANGED = (LoRA, IA3, VeRA, AdaLoRA)  # DoRA is a LoRA


@dataclass(frozen=True)
class Form:
    """One leaf: its suffix in the file, our axes (m inputs, n outputs, r rank), and both conversions."""

    suffix: str
    axes: str
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_jax: Callable[[np.ndarray], np.ndarray] = np.asarray


def forms(method: Exchanged, site: Site) -> dict[str, Form]:
    """Returns the leaves of ``method`` at ``site``, by our names.

    Raises:
        SiteError: PEFT has no form for them.
    """
    if not _has_form(method, site):
        raise SiteError(
            f"{site.path}: PEFT's files have no form for {type(method).__name__} of a layer of kind {site.kind} "
            f"{site.shape}"
        )
    if isinstance(method, IA3):
        return {"scale": _factors(site, method.on_inputs(site))}
    if isinstance(method, VeRA):
        return {"d": Form("vera_lambda_d", "r"), "b": Form("vera_lambda_b", "n")}
    if isinstance(method, AdaLoRA):
        return {
            "p": _inputs(site, "lora_A", flat=True),
            "lambda": Form("lora_E", "r", lambda x: x[:, None], np.ravel),
            "q": _transposed("lora_B", "rn"),
        }
    if site.kind == "embed":
        return {"a": _transposed("lora_embedding_A", "mr"), "b": _transposed("lora_embedding_B", "rn")}
    found = {"a": _inputs(site, "lora_A.weight"), "b": _transposed("lora_B.weight", "rn")}
    shape: tuple[int, ...] = (-1,)
    if site.kind == "conv":
        found["b"] = Form(
            "lora_B.weight", "rn", lambda x: x.T[..., None, None], lambda x: x.squeeze((2, 3)).T
        )
        shape = (1, -1, 1, 1)
    if isinstance(method, DoRA):
        found["magnitude"] = Form("lora_magnitude_vector", "n", lambda x: x.reshape(shape), np.ravel)
    return found


def _has_form(method: Exchanged, site: Site) -> bool:
    if site.kind == "dense":
        return True
    if site.kind == "embed":
        return type(method) is LoRA
    of_outputs = isinstance(method, IA3) and not method.on_inputs(site)
    return len(site.shape) == 4 and not isinstance(method, VeRA) and (site.groups == 1 or of_outputs)


def _factors(site: Site, on_inputs: bool) -> Form:
    """IA3's factors: torch holds (1, inputs) or (outputs, 1), and for a convolution (1, channels, 1, 1)."""
    if site.kind == "dense":
        if on_inputs:
            return Form("ia3_l", "m", lambda x: x[None], partial(np.squeeze, axis=0))
        return Form("ia3_l", "n", lambda x: x[:, None], partial(np.squeeze, axis=1))
    channels = partial(np.squeeze, axis=(0, 2, 3))
    if not on_inputs:
        return Form("ia3_l", "n", lambda x: x[None, :, None, None], channels)
    height, width, inputs, _ = site.shape

    def to_file(x: np.ndarray) -> np.ndarray:
        positions = x.reshape(height * width, inputs)
        if (positions != positions[0]).any():
            raise SiteError(
                f"{site.path}: PEFT's IA3 has one factor for each input channel of a convolution, and here they differ "
                f"between the {height} x {width} positions of the kernel: scale its outputs instead"
            )
        return positions[:1, :, None, None]

    return Form("ia3_l", "m", to_file, lambda x: np.tile(channels(x), height * width))


def _transposed(suffix: str, axes: str) -> Form:
    return Form(suffix, axes, np.transpose, np.transpose)


def _inputs(site: Site, suffix: str, flat: bool = False) -> Form:
    """The factor next to the inputs: torch holds (r, inputs), or (r, inputs, height, width) unless ``flat``."""
    if site.kind == "dense":
        return _transposed(suffix, "mr")
    height, width, inputs, _ = site.shape

    def to_file(x: np.ndarray) -> np.ndarray:
        found = x.reshape(height, width, inputs, x.shape[-1]).transpose(3, 2, 0, 1)
        return found.reshape(x.shape[::-1]) if flat else found

    def to_jax(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), inputs, height, width).transpose(2, 3, 1, 0).reshape(site.rows, len(x))

    return Form(suffix, "mr", to_file, to_jax)
