"""Translates between adapter methods and ``adapter_config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jtl.adapters.adalora import AdaLoRA
from jtl.adapters.dora import DoRA
from jtl.adapters.ia3 import IA3
from jtl.adapters.insert import Adapter
from jtl.adapters.lora import LoRA
from jtl.adapters.peft.files import CONFIG, AdapterFileError
from jtl.adapters.peft.forms import Exchanged
from jtl.adapters.site import Site
from jtl.adapters.vera import VeRA

# PEFT options that change what an adapter computes and that jtl does not have.
UNSUPPORTED = (
    "lora_bias", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Values of init_lora_weights that do not change the base weights; pissa, olora, corda, ... do.
STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


def to_config(
    adapter: Adapter, modules: list[str], ranks: list[int], *, transposed: bool = False
) -> dict[str, Any]:
    """Returns the configuration of ``adapter``.

    Args:
        adapter: the adapter.
        modules: torch's names of its sites.
        ranks: of its leaves there.
        transposed: whether torch stores these layers' weights as (in, out), like GPT-2's.
    """
    method = adapter.method
    common = {"target_modules": modules, "fan_in_fan_out": transposed, "inference_mode": True}
    if isinstance(method, IA3):
        inputs = [
            module for module, site in zip(modules, adapter.sites, strict=True) if method.on_inputs(site)
        ]
        return common | {"peft_type": "IA3", "feedforward_modules": inputs}
    common["bias"] = "none"
    if isinstance(method, VeRA):
        return common | {
            "peft_type": "VERA",
            "r": method.rank,
            "d_initial": method.initial,
            "vera_dropout": method.dropout,
            "save_projection": True,
        }
    if isinstance(method, AdaLoRA):
        # PEFT makes every layer with rank init_r, then cuts it to the pattern; and it requires a schedule.
        cut = {
            f"{module}.lora_E": [i < rank for i in range(method.rank)]
            for module, rank in zip(modules, ranks, strict=True)
            if rank != method.rank
        }
        return common | {
            "peft_type": "ADALORA",
            "init_r": method.rank,
            "target_r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "rank_pattern": cut or None,
            "total_step": 1,
        }
    assert isinstance(method, LoRA)
    scales = [method.scale(site, rank) for site, rank in zip(adapter.sites, ranks, strict=True)]
    alphas = [s * (r**0.5 if method.stabilised else r) for s, r in zip(scales, ranks, strict=True)]
    return common | {
        "peft_type": "LORA",
        "r": ranks[0],
        "lora_alpha": alphas[0],
        "lora_dropout": method.dropout,
        "use_rslora": method.stabilised,
        "use_dora": isinstance(method, DoRA),
        "rank_pattern": {re.escape(n): r for n, r in zip(modules, ranks, strict=True) if r != ranks[0]},
        "alpha_pattern": {re.escape(n): a for n, a in zip(modules, alphas, strict=True) if a != alphas[0]},
        "init_lora_weights": True,
    }


def from_config(
    config: Mapping[str, Any],
    folder: Path,
    sites: tuple[Site, ...],
    found: Mapping[str, Mapping[str, Any]],
    modules: Mapping[str, str],
) -> Exchanged:
    """Returns the method of ``config`` at ``sites``.

    Args:
        config: of the file.
        folder: for messages.
        sites: the adapted layers.
        found: the tensors of each, by suffix.
        modules: the file's own name of each.

    Raises:
        AdapterFileError: the configuration has an option that jtl does not support.
    """
    kind = config["peft_type"]
    for option in UNSUPPORTED:
        if config.get(option):
            raise AdapterFileError(f"{folder / CONFIG}: {option}={config[option]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{folder / CONFIG}: bias={config['bias']!r} is not supported; 'none' is")
    start = config.get("init_lora_weights")
    if str(start).lower() not in STARTS:
        raise AdapterFileError(
            f"{folder / CONFIG}: init_lora_weights={start!r} may have changed the base weights, which are not in this "
            "folder: convert it in PEFT by save_pretrained(..., path_initial_model_for_weight_conversion=<the "
            "adapter before training>), which loses a head, or merge_and_unload it there and load the whole model"
        )
    if kind == "IA3":
        inputs = [site.path for site in sites if _on_inputs(config, modules[site.path], folder)]
        return IA3("|".join(map(re.escape, inputs)) or "(?!)")
    if kind == "VERA":
        dropout = float(config.get("vera_dropout", 0.0))
        return VeRA(int(config["r"]), float(config.get("d_initial", 0.1)), dropout)
    dropout = float(config.get("lora_dropout", 0.0))
    if kind == "ADALORA":
        rank, alpha = int(config["init_r"]), float(config["lora_alpha"])
        return AdaLoRA(rank, alpha if alpha > 0 else float(rank), dropout)

    def alpha_at(site: Site) -> float:
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", modules[site.path]):
                return float(own)
        return float(config["lora_alpha"])

    def rank_at(site: Site) -> int:
        own = found[site.path]
        return len(own.get("lora_A.weight", own.get("lora_embedding_A", ())))

    alphas = tuple((re.escape(site.path), alpha_at(site)) for site in sites)
    ranks = tuple((re.escape(site.path), rank_at(site)) for site in sites)
    same = lambda rules: rules[0][1] if len({own for _, own in rules}) == 1 else rules  # noqa: E731
    cls = DoRA if config.get("use_dora") else LoRA
    return cls(same(ranks), same(alphas), bool(config.get("use_rslora")), dropout)


def _on_inputs(config: Mapping[str, Any], module: str, folder: Path) -> bool:
    """Whether PEFT's IA3 scales the inputs of ``module``: a string is a regex, a list holds ends of names."""
    ends = config.get("feedforward_modules")
    if ends is None:
        raise AdapterFileError(
            f"{folder / CONFIG}: feedforward_modules is missing: list the modules whose inputs are scaled, or []"
        )
    return bool(re.fullmatch(ends, module)) if isinstance(ends, str) else module.endswith(tuple(ends))
