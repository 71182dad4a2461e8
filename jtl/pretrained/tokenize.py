"""Tokenizers of pretrained models."""

from __future__ import annotations

import os
from typing import Any

from jtl.pretrained import ctranslate2, gguf
from jtl.pretrained.sources import resolve, tokenizer_files


def tokenizer(name: str | os.PathLike, revision: str | None = None) -> Any:
    """Return the ``transformers`` tokenizer in a model's folder or GGUF file; torch is not needed.

    Args:
        name: as for ``jtl.load``.
        revision: of a hub id.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        FormatError: the tokenizer in a GGUF file is of an unsupported kind.
        UnknownModelError, UnreachableHubError, WheelError: see ``resolve``.
    """
    folder = resolve(name, revision)
    if not any(file.name != "preprocessor_config.json" for file in tokenizer_files(folder)):
        if weights := gguf.gguf_file(folder):
            return gguf.tokenizer(weights)
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} holds no tokenizer: found {found}.")
    if ctranslate2.model_file(folder):
        return ctranslate2.tokenizer(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
