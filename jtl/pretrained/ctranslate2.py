"""Configuration and tokenizer of a Whisper model in CTranslate2's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jtl.models.whisper_config import MULTILINGUAL
from jtl.pretrained.formats import FormatError
from jtl.pretrained.formats.ctranslate2 import is_ctranslate2, open_ctranslate2

FILE = "model.bin"
# Settings of the layers, with the values that match the computation of ``jtl.models.whisper``.
KNOWN = {
    "pre_norm": 1,
    "activation": 3,
    "alibi": 0,
    "scale_embeddings": 0,
    "start_from_zero_embedding": 0,
}  # 3: GELU
ALIGNMENT = ("alignment_heads", "alignment_layer")  # for returned attention weights


def model_file(folder: Path) -> Path | None:
    """Return the weight file of a CTranslate2 folder, or None for any other folder."""
    file = Path(folder) / FILE
    return file if file.is_file() and is_ctranslate2(file) else None


def settings(file: Path) -> dict[str, Any]:
    """Return the content of a Whisper config.json: sizes from the weights, tokens from the config.json beside them.

    Raises:
        FormatError: the model is not Whisper, or it has an unknown setting.
    """
    found = open_ctranslate2(file)
    if found.kind != "WhisperSpec":
        raise FormatError(
            f"{file} holds a {found.kind}; of CTranslate2's files only those of Whisper are read."
        )
    own = {name: array for name, array in found.variables.items() if array.ndim == 0}
    shapes = {name: array.shape for name, array in found.variables.items() if array.ndim}
    config: dict[str, Any] = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    for side in ("encoder", "decoder"):
        config[f"{side}_layers"] = sum(
            name.endswith("ffn/layer_norm/beta") for name in shapes if side in name
        )
        config[f"{side}_attention_heads"] = int(own.pop(f"{side}/num_heads"))
        config[f"{side}_ffn_dim"] = shapes[f"{side}/layer_0/ffn/linear_0/weight"][0]
    for name, value in own.items():
        setting = name.split("/")[-1]
        if setting not in ALIGNMENT and (setting not in KNOWN or value != KNOWN[setting]):
            raise FormatError(f"{file}: the setting {name}={value} is not supported.")
    config["vocab_size"], config["d_model"] = shapes["decoder/embeddings/weight"]
    config["num_mel_bins"] = shapes["encoder/conv1/weight"][1]
    config["max_source_positions"] = shapes["encoder/position_encodings/encodings"][0]
    config["max_target_positions"] = shapes["decoder/position_encodings/encodings"][0]
    end = 50257 if config["vocab_size"] >= MULTILINGUAL else 50256
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    config["decoder_start_token_id"] = end + 1
    tokens = json.loads((file.parent / "config.json").read_text())
    return config | {
        "suppress_tokens": tokens["suppress_ids"],
        "begin_suppress_tokens": tokens["suppress_ids_begin"],
    }


def tokenizer(folder: Path) -> Any:
    """Return Whisper's ``transformers`` tokenizer from the folder's tokenizer.json."""
    from transformers import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(folder)
