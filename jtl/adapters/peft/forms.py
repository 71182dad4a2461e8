"""How each leaf of an adapter is called and laid out in PEFT's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """One leaf: its suffix in the file, our axes (m inputs, n outputs, r rank), and the way there and back."""

    suffix: str
    axes: str
    to_file: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_jax: Callable[[np.ndarray], np.ndarray] = np.asarray


def forms(method: Exchanged, site: Site) -> dict[str, Form]:
    """The leaves of ``method`` at ``site``, by our names. Raises SiteError for what PEFT has no form for."""
    plain = site.kind == "dense" or (site.kind == "conv" and len(site.shape) == 4 and site.groups == 1)
    embeds = site.kind == "embed" and type(method) is LoRA
    if not (plain or embeds or isinstance(method, IA3)) or (
        isinstance(method, VeRA) and site.kind != "dense"
    ):
        raise SiteError(
            f"{site.path}: PEFT's files have no form for {type(method).__name__} of a layer of kind {site.kind} "
            f"{site.shape}"
        )
    if isinstance(method, IA3):
        if method.on_inputs(site):
            return {"scale": Form("ia3_l", "m", lambda x: x[None], np.ravel)}
        return {"scale": Form("ia3_l", "n", lambda x: x[:, None], np.ravel)}
    if isinstance(method, VeRA):
        return {"d": Form("vera_lambda_d", "r"), "b": Form("vera_lambda_b", "n")}
    if isinstance(method, AdaLoRA):
        return {
            "p": _inputs(site, "lora_A", flat=True),
            "lambda": Form("lora_E", "r", lambda x: x[:, None], np.ravel),
            "q": _transposed("lora_B", "rn"),
        }
    if embeds:
        return {"a": _transposed("lora_embedding_A", "mr"), "b": _transposed("lora_embedding_B", "rn")}
    found = {"a": _inputs(site, "lora_A.weight"), "b": _transposed("lora_B.weight", "rn")}
    shape: tuple[int, ...] = (-1,)
    if site.kind == "conv":
        found["b"] = Form("lora_B.weight", "rn", lambda x: x.T[..., None, None], lambda x: x[..., 0, 0].T)
        shape = (1, -1, 1, 1)
    if isinstance(method, DoRA):
        found["magnitude"] = Form("lora_magnitude_vector", "n", lambda x: x.reshape(shape), np.ravel)
    return found


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
