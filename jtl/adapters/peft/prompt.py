"""Prompts and prefixes in PEFT's files: one array, ``prompt_embeddings``, and the head at ``base_model.<torch path>``.

A prompt is (p, D). A prefix is (p, layers * 2 * D): each row holds the key and the value of every layer in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import heads, tree
from jtl.adapters.insert import Adapter
from jtl.adapters.peft import head
from jtl.adapters.peft.files import CONFIG, AdapterFileError, Tensors
from jtl.adapters.prefix import Prefix, prefix
from jtl.adapters.prompt import VECTORS, WORD, Prompt, is_text, prompt
from jtl.errors import InputError
from jtl.model import Model

PREFIX, KEY = "base_model.", "prompt_embeddings"
KINDS: dict[str, Callable[..., Model]] = {"PROMPT_TUNING": prompt, "PREFIX_TUNING": prefix}
CACHED = ("bert", "roberta")  # PEFT passes a prefix as a cache, which DistilBERT and ViT do not accept


def find(model: Model, name: str | None) -> Prompt | Prefix | None:
    """Returns the prompt or prefix called ``name``, or the only adapter if it is one; None otherwise.

    Raises:
        ValueError: there are other adapters too, and no name.
    """
    there = [
        t for t in model.techniques if isinstance(t, (Adapter, Prompt, Prefix)) and name in (None, t.name)
    ]
    if len(there) > 1 and any(isinstance(t, (Prompt, Prefix)) for t in there):
        raise InputError(f"expected one adapter, found {[t.name for t in there]}: name one")
    return there[0] if there and isinstance(there[0], (Prompt, Prefix)) else None


def write(model: Model, technique: Prompt | Prefix) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the configuration, without the head.

    Raises:
        ValueError: PEFT cannot compute this model.
    """
    if isinstance(technique, Prompt) and technique.pooled == "text" and heads.find(model):
        raise InputError(
            f"{technique.name!r} leaves pooled to the text (pooled='text'); under PEFT the head would read the prompt"
        )
    kind = model.config.model_type
    if isinstance(technique, Prefix) and kind not in CACHED:
        raise InputError(f"PEFT runs prefixes of {' and '.join(CACHED)} here, this model is {kind}")
    params = tree.flatten(model.params)
    rows = [np.asarray(params[path]) for path in _leaves(technique)]
    width, layers = rows[0].shape[-1], getattr(model.config, "num_hidden_layers", None)
    config = {
        "peft_type": "PROMPT_TUNING" if isinstance(technique, Prompt) else "PREFIX_TUNING",
        "task_type": "FEATURE_EXTRACTION",  # a head makes it SEQ_CLS; without one PEFT drops token types
        "num_virtual_tokens": technique.length,
        "token_dim": width,
        "num_layers": layers or model.config.n_layers,
        "num_attention_heads": getattr(model.config, "num_attention_heads", None) or model.config.n_heads,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    if isinstance(technique, Prefix):
        config |= {"encoder_hidden_size": width, "prefix_projection": False}
    return {KEY: np.concatenate(rows, -1)}, config


def read(model: Model, config: Mapping[str, Any], tensors: Tensors, name: str | None, folder: Path) -> Model:
    """Returns ``model`` with the prompt or prefix of ``tensors``, and with the head if there is one.

    A prefix that PEFT trained through an MLP (``prefix_projection``) is saved as the output of the MLP.

    Raises:
        AdapterFileError: a key is missing or left over, a shape differs, or the model does not read text.
    """
    if config.get("num_transformer_submodules") not in (None, 1):
        submodules = config["num_transformer_submodules"]
        raise AdapterFileError(
            f"{folder / CONFIG}: num_transformer_submodules={submodules!r} is not supported"
        )
    if not is_text(model):
        raise AdapterFileError(f"{folder}: it is for a text model, this one is {model.config.model_type}")
    plain = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    of_head, others = head.split(model, plain, folder)
    left = [*others, *(key for key in tensors if key != KEY and not key.startswith(PREFIX))]
    if left or KEY not in tensors:
        lack = "" if KEY in tensors else f"{KEY!r} is missing"
        raise AdapterFileError(f"{folder}: {lack or f'{left[0]!r} belongs to nothing in this model'}")
    array = tensors[KEY]
    length = int(config.get("num_virtual_tokens") or len(array))
    insert = KINDS[config["peft_type"]]
    kind = insert.__name__
    # The key draws placeholders for the vectors of the file.
    drawn = insert(model, length=length, name=name or kind, key=jax.random.key(0))
    technique = drawn.techniques[-1]
    assert isinstance(technique, (Prompt, Prefix))
    paths = _leaves(technique)
    expected = (length, len(paths) * tree.flatten(drawn.params)[paths[0]].shape[-1])
    if array.shape != expected:
        raise AdapterFileError(
            f"{folder}: {KEY} has shape {array.shape}, expected {expected}: it is of another model"
        )
    parts = map(jnp.asarray, np.split(array, len(paths), -1))
    leaves = tree.nest(dict(zip(paths, parts, strict=True)))
    return head.read(model, config, of_head, folder).with_technique(technique, leaves)


def _leaves(technique: Prompt | Prefix) -> list[str]:
    """The paths of its leaves, in the order of the file."""
    sites = (WORD,) if isinstance(technique, Prompt) else technique.sites()
    return [f"{site}/{technique.name}/{VECTORS}" for site in sites]
