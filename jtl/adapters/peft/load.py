"""Reads a PEFT folder."""

from __future__ import annotations

import os
from pathlib import Path

from jtl.adapters.peft import files, head, layers, norms, prompt
from jtl.adapters.peft.files import CONFIG, PREFIX, AdapterFileError
from jtl.model import Model

LAYERS = ("LORA", "IA3", "VERA", "ADALORA")


def load(model: Model, folder: str | os.PathLike, *, name: str | None = None) -> Model:
    """Returns ``model`` with the adapter of a PEFT folder, and with its head if the folder has one.

    Args:
        model: the base model that the adapter was trained on. Its head is replaced, and with LN tuning its norms.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter here; by default ``lora``, ``dora``, ``ia3``, ``vera``, ``adalora``, ``prompt`` or
            ``prefix``.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a method or option that jtl does not have; a key that lacks PEFT's prefix, belongs to no
            layer of this model, is missing, left over or duplicated; or a tensor of another shape.
    """
    folder = Path(folder)
    config, tensors = files.read(folder)
    kind = config.get("peft_type")
    if kind in prompt.KINDS:
        return prompt.read(model, config, tensors, name, folder)
    if kind not in (*LAYERS, "LN_TUNING"):
        raise AdapterFileError(
            f"{folder / CONFIG}: peft_type is {kind!r}; {', '.join(LAYERS)} and LN_TUNING can be read, and for "
            f"texts {' and '.join(prompt.KINDS)}"
        )
    beside = set(layers.SHARED.values()) if kind == "VERA" else set()
    shared = {key: tensor for key, tensor in tensors.items() if key in beside}
    naked = [key for key in tensors if not key.startswith(PREFIX) and key not in shared]
    if naked:
        raise AdapterFileError(
            f"{folder}: {len(naked)} keys lack the prefix {PREFIX!r}, such as {naked[0]!r}; PEFT would pass them over"
        )
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key not in shared}
    of_head, own = head.split(model, plain, folder)
    model = head.read(model, config, of_head, folder)
    if kind == "LN_TUNING":
        return norms.read(model, config, own, folder)
    return layers.read(model, config, own, shared, name, folder)
