"""Tokenizers of pretrained models."""

from __future__ import annotations

import os
from typing import Any

from jtl.pretrained import ctranslate2, gguf
from jtl.pretrained.formats.tensors import FormatError
from jtl.pretrained.sources import resolve, tokenizer_files


def tokenizer(name: str | os.PathLike, revision: str | None = None) -> Any:
    """Return the ``transformers`` tokenizer in a model's folder or GGUF file; torch is not needed.

    Args:
        name: as for ``jtl.load``.
        revision: of a hub id.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        FormatError: the tokenizer in a GGUF file is of an unsupported kind, or the folder's tokenizer is Python code of
            its own, which jtl never runs.
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

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers has no type of error for it
        settings = [folder / "tokenizer_config.json", folder / "config.json"]
        own = any(
            file.exists() and '"AutoTokenizer"' in file.read_text(encoding="utf-8") for file in settings
        )
        if not own and "trust_remote_code" not in str(error):
            raise
        raise FormatError(
            f"{folder}: its tokenizer is Python code in the folder (auto_map), which jtl never runs: take the "
            "tokenizer of the model that it was made from, or one in files (tokenizer.json)"
        ) from error
