"""Tokenizers of pretrained models."""

from __future__ import annotations

import os
from typing import Any

from jtl.pretrained.sources import resolve, tokenizer_files


def tokenizer(name: str | os.PathLike, revision: str | None = None) -> Any:
    """The ``transformers`` tokenizer in a model's folder; needs no torch.

    Raises FileNotFoundError if the folder holds none, and what ``resolve`` raises.
    """
    folder = resolve(name, revision)
    if not any(file.name != "preprocessor_config.json" for file in tokenizer_files(folder)):
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} holds no tokenizer: found {found}.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
