"""PEFT's files of convolutions and embeddings, of adapters that were trained, and of those that changed the base."""

import jax
import numpy as np
import optax
import pytest
from peft_models import (
    batch_of,
    close,
    differ,
    for_task,
    stir_torch,
    stirred,
    torch_batch,
    torch_logits,
    torch_model,
)

from jtl import adapters, finetune, pretrained, tasks, train
from jtl.adapters import SiteError, peft
from jtl.adapters.peft import AdapterFileError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def config_of(method, target, name):
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    common = {"target_modules": [target], **for_task(name)}
    return {
        "lora": lambda: LoraConfig(r=3, lora_alpha=6, **common),
        "dora": lambda: LoraConfig(r=3, lora_alpha=6, use_dora=True, **common),
        "adalora": lambda: AdaLoraConfig(init_r=4, lora_alpha=800, total_step=10, **common),
        "ia3": lambda: IA3Config(feedforward_modules=[], **common),
        "ia3 of inputs": lambda: IA3Config(feedforward_modules=[target], **common),
    }[method]()


@pytest.mark.parametrize(
    "name, target, method",
    [
        *(("vit", "projection", method) for method in ("lora", "dora", "adalora", "ia3", "ia3 of inputs")),
        ("bert", "word_embeddings", "lora"),
    ],
)
def test_other_layers_both_ways(name, target, method, tmp_path):
    from peft import PeftModel, get_peft_model

    theirs = stir_torch(get_peft_model(torch_model(name, tmp_path / "base"), config_of(method, target, name)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    base, batch = pretrained.load(str(tmp_path / "base")), batch_of(name)
    ours = peft.load(base, tmp_path / "theirs")
    close(ours(batch)["logits"], torch_logits(theirs, batch))
    differ(
        ours(batch)["logits"], base.with_params({**base.params, "head": ours.params["head"]})(batch)["logits"]
    )

    folder = peft.save(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(torch_model(name, tmp_path / "base"), str(folder))
    close(torch_logits(again, batch), ours(batch)["logits"])
    if method == "ia3 of inputs":  # ours has a factor for each position of the kernel too
        with pytest.raises(
            SiteError, match="embeddings/patch: PEFT's IA3 has one factor for each input channel"
        ):
            peft.save(stirred(ours), tmp_path / "positions")


def labelled():
    rng = np.random.default_rng(1)
    return {"input_ids": rng.integers(3, 60, (8, 7)).astype(np.int32), "label": rng.integers(0, 3, 8)}


def test_trained_here_opens_in_peft(tmp_path):
    from peft import PeftModel

    base = torch_model("bert", tmp_path / "base")
    model = adapters.lora(pretrained.load(str(tmp_path / "base")), rank=3, key=jax.random.key(0))
    labels = finetune.train_only(model, ".*/lora/.*|head/.*")
    step = train.make_step(tasks.Classify(), optax.adamw(1e-2), labels)
    state = step.init(model, jax.random.key(1))
    for _ in range(3):
        state, _ = step(state, labelled())
    trained, batch = state.model, batch_of("bert")
    differ(trained(batch)["logits"], model(batch)["logits"])
    folder = peft.save(trained, tmp_path / "adapter")
    close(torch_logits(PeftModel.from_pretrained(base, str(folder)), batch), trained(batch)["logits"])


def test_trained_in_peft_opens_here(tmp_path):
    import torch
    from peft import get_peft_model

    base, batch = torch_model("bert", tmp_path / "base"), batch_of("bert")
    before = torch_logits(base, batch)
    theirs = get_peft_model(base, config_of("lora", "query", "bert")).train()
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, 1e-2)
    inputs = torch_batch(labelled())
    for _ in range(3):
        optimiser.zero_grad()
        theirs(input_ids=inputs["input_ids"], labels=inputs["label"]).loss.backward()
        optimiser.step()
    differ(torch_logits(theirs, batch), before)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    close(ours(batch)["logits"], torch_logits(theirs, batch))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_converted_first(start, tmp_path):
    from peft import LoraConfig, get_peft_model

    # Without a head, which PEFT leaves out of what it converts.
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query"], init_lora_weights=start)
    theirs = get_peft_model(torch_model("bert", tmp_path / "base"), config)
    theirs.save_pretrained(str(tmp_path / "initial"))
    stir_torch(theirs).save_pretrained(str(tmp_path / "changed"))
    base, batch = pretrained.load(str(tmp_path / "base")), batch_of("bert")
    with pytest.raises(
        AdapterFileError, match=f"init_lora_weights='{start}' .* path_initial_model_for_weight"
    ):
        peft.load(base, tmp_path / "changed")
    theirs.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    close(peft.load(base, tmp_path / "plain")(batch)["logits"], torch_logits(theirs, batch))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "dense"]},
        {"target_modules": r".*\.1\..*(query|fc2)"},
        {"target_modules": ["query", "layers.0.mlp.fc2"], "exclude_modules": ["layer.1.attention.self.query"]},
        {"target_modules": ["query", "fc1"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["query", "q_proj", "encoder.layer.0.output.dense"], "layers_to_transform": 1},
        {"target_modules": ["query", "q_proj"], "layers_to_transform": [0, 7]},
        {"target_modules": ["query", "q_proj"], "layers_to_transform": []},
        {"target_modules": ["query", "q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["query", "word_embeddings"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]},
        {"target_modules": ["dense"], "modules_to_save": ["pooler", "attention"]},
    ],
)  # fmt: skip
def test_layers_are_targeted_as_in_peft(options):
    from numpy_encoder import small
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    from jtl.adapters.peft import names

    for model in map(small, ("bert", "vit")):
        for module in sorted(set().union(*names._spellings(model, names.WEIGHTED))):
            theirs = check_target_module_exists(LoraConfig(**options), module)
            expected = bool(theirs) and not isinstance(theirs, _ExcludedModule)
            assert names._targeted(options, module) == expected, module
