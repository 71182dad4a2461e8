"""Writes a PEFT folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from jtl import heads
from jtl.adapters.peft import files, head, layers, names, prompt
from jtl.adapters.peft import norms as own_norms
from jtl.model import Model


def save(
    model: Model,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    transformers: Literal[4, 5] = 5,
    name: str | None = None,
    norms: str | None = None,
) -> Path:
    """Writes the adapter of ``model``, and its head, as a folder that ``peft.PeftModel.from_pretrained`` opens.

    Args:
        model: with an architecture of ``jtl.models`` and one adapter.
        folder: absent or empty.
        base: PEFT's name of the base model: a hub id or folder.
        transformers: the version whose module names to write; version 5 renamed those of ViT, DeiT and DINOv2 in
            memory.
        name: of the adapter, if there are several.
        norms: regular expression of module paths, such as ``".*norm"``: writes these norms of a model without
            adapters, as PEFT's LN tuning.

    Returns:
        The folder.

    Raises:
        ValueError: no adapter, several, or one of a method that cannot be written to PEFT's files.
        RuleError: ``norms`` matches no norm.
        SiteError: PEFT's files have no form for a layer.
        FileExistsError: ``folder`` is not empty.
    """
    task = names.architecture(model).prefix if heads.find(model) else ""
    prefix = files.PREFIX
    if norms is None and (technique := prompt.find(model, name)):
        prefix = prompt.PREFIX
        tensors, config = prompt.write(model, technique)
    elif norms is None:
        tensors, config = layers.write(model, name, files.PREFIX, task, transformers)
    else:
        tensors, config = own_norms.write(model, norms, files.PREFIX, task, transformers)
    of_head, more = head.write(model, prefix)
    return files.write(folder, {**config, **more, "base_model_name_or_path": base}, {**tensors, **of_head})
