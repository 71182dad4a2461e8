"""Configuration and tokenizer of a language model in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.pretrained.formats import FormatError
from jtl.pretrained.formats.gguf import open_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # config.json uses the same names
SETTINGS = {  # after the architecture's name and a dot
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are never split


def gguf_file(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder, or None.

    Raises:
        FormatError: the folder holds several.
    """
    files = sorted(Path(folder).glob("*.gguf"))
    if len(files) > 1:
        names = [file.name for file in files]
        raise FormatError(f"{folder} holds several GGUF files, {names}: leave one in it.")
    return files[0] if files else None


def settings(file: Path) -> dict[str, Any]:
    """Return the content of a config.json from the file's metadata.

    Raises:
        FormatError: the architecture is not supported, or an unknown setting may change the computation.
    """
    found = open_gguf(file)
    kind = found.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"{file} holds the architecture {kind!r}; GGUF files of {', '.join(ARCHITECTURES)} are read: take the "
            "model's safetensors instead."
        )
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in found.metadata.items()
        if key.startswith(f"{kind}.")
    }
    config = {name: _shortest(own.pop(key)) for key, name in SETTINGS.items() if key in own}
    scaling = own.pop("rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": own.pop("rope.scaling.factor", None)}
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.pop(key, size) != size:
            raise FormatError(f"{file}: {kind}.{key} is not {size}, the size of a head: not supported.")
    if own:
        raise FormatError(f"{file}: settings {sorted(own)} of {kind} are not supported.")
    for name, key in IDS.items():
        if (token := found.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[key] = token
    config.setdefault("vocab_size", len(found.metadata.get("tokenizer.ggml.tokens", ())))
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "tie_word_embeddings": "output.weight" not in found.tensors,
        "attention_bias": "blk.0.attn_q.bias" in found.tensors,
        **config,
    }


def _shortest(value: Any) -> Any:
    """Round a float32 to its shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def tokenizer(file: Path) -> Any:
    """Return the file's tokenizer as a fast tokenizer of ``transformers``.

    Raises:
        FormatError: the file has no tokenizer, or one of an unsupported kind.
    """
    metadata = open_gguf(file).metadata
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise FormatError(
            f"{file}: expected a tokenizer of the kind gpt2 that splits as smollm, found {kind!r}, {split!r}: take the "
            "tokenizer from the model's own folder, transformers.AutoTokenizer.from_pretrained(FOLDER)."
        )
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    types = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    for token, type_ in types:
        if type_ in (CONTROL, USER_DEFINED):
            built.add_tokens([AddedToken(token, normalized=False, special=type_ == CONTROL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=settings(file)["max_position_embeddings"],
        **_special(metadata, tokens),
    )


def _special(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    return {name: tokens[i] for name, i in found.items() if i is not None}
