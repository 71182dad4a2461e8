"""Save a model as a Hugging Face folder that ``transformers`` opens without missing or unexpected keys."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl import heads, tree
from jtl._files import umask
from jtl.errors import InputError
from jtl.model import Cast, Model
from jtl.models.architecture import Architecture, HeadSpec, Tensor
from jtl.models.parts.scan import unstack
from jtl.pretrained.load import WeightsError, find_architecture, head_tensors
from jtl.pretrained.sources import resolve, tokenizer_files
from jtl.pretrained.tokenize import tokenizer as load_tokenizer


def save(
    model: Model,
    folder: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    id2label: Mapping[int, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``config.json`` and ``model.safetensors``; the folder appears atomically, complete.

    Whisper models also get the ``generation_config.json`` that ``transformers`` uses for transcription.

    Args:
        model: of an architecture in ``jtl.models``: bare, with its standard classification head, or with that of
            ``jtl.tasks.span_head``.
        folder: must be absent or empty, unless ``overwrite`` is true.
        tokenizer: name or folder (see ``resolve``) whose tokenizer files are copied too; a tokenizer in a GGUF file is
            written as files.
        id2label: name of each class.
        overwrite: replace a folder that holds a model.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no architecture of jtl, or has a technique that plain weights cannot express.
        WeightsError: leaves have no place in the architecture's files, or are missing.
        FileExistsError: ``folder`` is not empty.
        FileNotFoundError: ``tokenizer`` has no tokenizer.
    """
    folder, model = Path(folder), unstack(model)
    architecture, head, names = check_savable(model)
    tensors = _to_file(model, names, architecture.prefix if head else "")
    settings = {"architectures": [architecture.base_class], **model.config.to_hf()}
    if head:
        settings["architectures"] = [_spec(architecture, model.config, head).task_class]
    if head and head.output == model.config.head.output:
        settings |= _labels(head.module.classes, id2label)
    elif id2label is not None:
        raise InputError("id2label names the classes of a head, and this model has no classifier.")
    copies = tokenizer_files(resolve(tokenizer)) if tokenizer is not None else []
    built = load_tokenizer(tokenizer) if tokenizer is not None and not copies else None

    _check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        from safetensors.numpy import save_file

        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if hasattr(model.config, "generation"):
            text = json.dumps(model.config.generation(), indent=2, sort_keys=True) + "\n"
            (temporary / "generation_config.json").write_text(text)
        for file in copies:
            shutil.copyfile(file, temporary / file.name)
        if built is not None:
            built.save_pretrained(temporary)
        temporary.chmod(0o777 & ~umask())
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_savable(model: Model) -> tuple[Architecture, heads.Head | None, dict[str, Tensor]]:
    """Return the architecture, its head if there is one, and the tensor of every leaf that ``save`` would write.

    Call it before a long training to see whether the result can be saved.

    Raises:
        ValueError: see ``save``.
        WeightsError: see ``save``.
    """
    if not hasattr(model.config, "to_hf"):
        raise InputError(f"only models of jtl.models can be saved so; this one's config is {model.config!r}.")
    architecture = find_architecture(model.config.to_hf()["model_type"])
    model = unstack(model)
    head = _head(model, architecture)
    if head and getattr(model.config, "ctc", False):
        raise InputError(
            f"{model.config.head.task_class} has no layer for CTC beside its classifier: jtl.tasks.ctc.without_head "
            "takes it off"
        )
    names, leaves = dict(architecture.tensors(model.config)), tree.flatten(model.variables)
    if head:
        spec = _spec(architecture, model.config, head)
        names |= head_tensors(spec)
        for path in [path for path in names if spec.unused and re.fullmatch(spec.unused, path)]:
            del names[path]
            leaves.pop(path, None)
    lacking, homeless = sorted(set(names) - set(leaves)), sorted(set(leaves) - set(names))
    if lacking or homeless:
        raise WeightsError(
            f"cannot save: leaves without a tensor {homeless[:5]}, tensors without a leaf {lacking[:5]}."
        )
    return architecture, head, names


def _head(model: Model, architecture: Architecture) -> heads.Head | None:
    """The head, if it has one that files can hold; ValueError for a technique that they cannot express."""
    found = None
    for technique in model.techniques:
        is_head = isinstance(technique, heads.Head) and technique.name == "head"
        if isinstance(technique, heads.Head) and is_head and isinstance(technique.module, heads.Classifier):
            module, spec = technique.module, _spec(architecture, model.config, technique)
            activation = module.activation if module.hidden else spec.activation
            own = (technique.on, module.hidden, activation, module.width)
            if own == (spec.on, spec.hidden, spec.activation, spec.width):
                found = technique
                continue
            raise InputError(
                f"the head reads {technique.on!r}, hidden={module.hidden}, {module.activation!r}, "
                f"width={module.width}; {spec.task_class} expects {spec.on!r}, hidden={spec.hidden}, "
                f"{spec.activation!r}, width={spec.width}."
            )
        if not isinstance(technique, Cast):
            raise InputError(
                f"technique {technique!r} cannot be written as plain {architecture.name} weights: merge or "
                "remove it first."
            )
    return found


def _spec(architecture: Architecture, config: Any, head: heads.Head) -> HeadSpec:
    """The form of a head with this output in the architecture's files; by default that of its classifier."""
    spans = architecture.spans
    return spans if spans is not None and head.output == spans.output else config.head


def _to_file(model: Model, names: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    leaves, written = tree.flatten(model.variables), {}
    for path, tensor in names.items():
        key = tensor.key if path.startswith("params/head/") else prefix + tensor.key
        written[key] = np.asarray(tensor.layout.to_file(np.asarray(leaves[path])), order="C")
        if key.endswith(
            ".running_mean"
        ):  # torch's BatchNorm counts batches, and transformers expects the count
            written[key.removesuffix("running_mean") + "num_batches_tracked"] = np.zeros((), np.int64)
    return written


def _labels(classes: int, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    labels = {i: f"LABEL_{i}" for i in range(classes)} if id2label is None else dict(id2label)
    if sorted(labels) != list(range(classes)):
        raise InputError(f"id2label: expected the classes 0 to {classes - 1}, found {sorted(labels)[:8]}.")
    return {
        "id2label": {str(i): str(labels[i]) for i in range(classes)},
        "label2id": {str(labels[i]): i for i in range(classes)},
    }


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; a folder is needed.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: choose another, or pass overwrite=True.")
    if not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} holds no model (no config.json), so it is not deleted.")


def _swap(temporary: Path, folder: Path) -> None:
    if not folder.is_dir():
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "old"
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
