"""PEFT's files, checked against the real PEFT: the same logits from the same folder, in both directions."""

import re

import jax
import numpy as np
import pytest
from peft_models import (
    METHODS,
    MODELS,
    batch_of,
    close,
    differ,
    for_task,
    stir_torch,
    stirred,
    torch_logits,
    torch_model,
)

from jtl import pretrained, tree
from jtl.adapters import peft

# PEFT and transformers deprecate each other's names.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

NEW = ("vera", "adalora")  # not on dinov2, for time's sake
CASES = [(name, method) for name in MODELS for method in METHODS if method not in NEW or name != "dinov2"]
WHERE = ".*/(query|value|mlp/output)"


@pytest.mark.parametrize("name, method", CASES)
def test_ours_opens_in_peft_and_comes_back(name, method, tmp_path):
    from peft import PeftModel

    base = torch_model(name, tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    insert, options = METHODS[method]
    adapted = stirred(insert(ours, where=WHERE, key=jax.random.key(0), **options))
    peft.save(adapted, tmp_path / "adapter", base=str(tmp_path / "base"))

    batch = batch_of(name)
    expected = adapted(batch)["logits"]
    old_head = {**adapted.params, "head": ours.params["head"]}
    differ(expected, adapted.with_params(old_head)(batch)["logits"])
    differ(expected, ours.with_params({**ours.params, "head": adapted.params["head"]})(batch)["logits"])
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    close(torch_logits(theirs, batch), expected)
    back = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    close(back(batch)["logits"], expected, 1e-5)


@pytest.mark.parametrize("name, method", [case for case in CASES if case[1] != "patterns"])
def test_theirs_opens_here(name, method, tmp_path):
    from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model

    base = torch_model(name, tmp_path / "base")
    query, value, output = {
        "distilbert": ("q_lin", "v_lin", "lin2"),
        "vit": ("q_proj", "v_proj", "fc2"),
        "dinov2": ("q_proj", "v_proj", "fc2"),
    }.get(name, ("query", "value", "output.dense"))
    common = {"target_modules": [query, value, output], **for_task(name)}
    if method == "ia3":  # a list of ends or a regex
        config = IA3Config(
            feedforward_modules=rf".*{re.escape(output)}" if name == "roberta" else [output], **common
        )
    elif method == "vera":
        config = VeraConfig(r=5, **common)
    elif method == "adalora":
        config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, **common)
    else:
        config = LoraConfig(
            r=4, lora_alpha=6, use_dora=method == "dora", use_rslora=method == "rslora", rank_pattern={query: 2},
            **common,
        )  # fmt: skip
    theirs = stir_torch(get_peft_model(base, config))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    batch = batch_of(name)
    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    close(ours(batch)["logits"], torch_logits(theirs, batch))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # of its own files too
def test_pruned_ranks_both_ways(tmp_path):
    """PEFT cuts pruned values out of its files and keeps the scale; one layer here has none left."""
    import torch
    from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model

    batch = batch_of("bert")
    config = AdaLoraConfig(
        init_r=3, lora_alpha=6, total_step=10, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS
    )
    theirs = get_peft_model(torch_model("bert", tmp_path / "base"), config)
    layer = "bert.encoder.layer.{}.attention.self.{}.lora_E.default"
    pattern = {
        layer.format(0, "query"): [False, True, True],
        layer.format(0, "value"): [True, False, False],
        layer.format(1, "query"): [False, False, False],
        layer.format(1, "value"): [True, True, True],
    }
    with torch.no_grad():
        for path, parameter in theirs.base_model.model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
            if path in pattern:
                parameter *= torch.tensor(pattern[path])[:, None]
    expected = torch_logits(theirs, batch)
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(str(tmp_path / "adapter"))

    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    ranks = [leaf.size for path, leaf in tree.flatten(ours.params).items() if path.endswith("/lambda")]
    assert ranks == [2, 1, 0, 3]
    close(ours(batch)["logits"], expected)
    peft.save(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(torch_model("bert", tmp_path / "base"), str(tmp_path / "again"))
    close(torch_logits(again, batch), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "vit"])
def test_norms_both_ways(name, tmp_path):
    import torch
    from peft import LNTuningConfig, PeftModel, get_peft_model

    batch = batch_of(name)
    targets = {
        "distilbert": ["sa_layer_norm", "output_layer_norm"],
        "vit": ["layernorm_before", "layernorm_after"],
    }.get(name, ["LayerNorm"])
    config = LNTuningConfig(target_modules=targets, **for_task(name))
    theirs = get_peft_model(torch_model(name, tmp_path / "base"), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    base = pretrained.load(str(tmp_path / "base"))
    ours = peft.load(base, tmp_path / "theirs")
    close(ours(batch)["logits"], torch_logits(theirs, batch))
    assert ours.techniques == base.techniques  # no adapter: they are the model's own

    # Ours: all norms, and with them another head.
    def noise(path, leaf):
        own = "norm" in path or path.startswith("head")
        return leaf + 0.2 * jax.random.normal(tree.fold_path(jax.random.key(7), path), leaf.shape) * own

    tuned = base.with_params(tree.map_with_path(noise, base.params))
    folder = peft.save(tuned, tmp_path / "ours", norms=".*norm")
    again = PeftModel.from_pretrained(torch_model(name, tmp_path / "base"), str(folder))
    close(torch_logits(again, batch), tuned(batch)["logits"])
    back = peft.load(base, folder)
    np.testing.assert_array_equal(back(batch)["logits"], tuned(batch)["logits"])
