"""Tokenizers of pretrained models."""

from __future__ import annotations

import os
from typing import Any

from jtl.pretrained import ctranslate2, gguf
from jtl.pretrained.sources import resolve, tokenizer_files


def tokenizer(name: str | os.PathLike, revision: str | None = None) -> Any:
    """The ``transformers`` tokenizer in a model's folder, or in its GGUF file; needs no torch.

    Raises FileNotFoundError if the folder holds none, FormatError if that of a GGUF file is of a kind not known, and
    what ``resolve`` raises.
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
