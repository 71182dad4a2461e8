import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, tree
from jtl.loss import Loss
from jtl.model import Linen, Model, linen
from jtl.models import ARCHITECTURES
from jtl.models.bert import Bert, BertConfig
from jtl.models.efficientnet_lite import VARIANTS, EfficientNetLite
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

CONFIG = BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(2), (8, 6), 0, 30)
    return {"input_ids": ids, "attention_mask": jnp.ones((8, 6), jnp.int32), "label": jnp.arange(8) % 2}


@pytest.fixture(scope="module")
def model(batch):
    variables = jax.jit(Bert(CONFIG).init)(jax.random.key(0), batch["input_ids"])
    return heads.classifier(
        Model(dict(variables), Linen(Bert(CONFIG)), config=CONFIG), 2, key=jax.random.key(1)
    )


def named(paths):
    """A model of leaves with these paths."""
    return function(lambda params, x: x, tree.nest(dict.fromkeys(paths, 1.0)))


def part_of(path: str) -> str:
    return "/".join(path.split("/")[: 2 if path.startswith("encoder") else 1])


def by_part(labels) -> dict:
    parts: dict = {}
    for path, label in tree.flatten(labels).items():
        parts.setdefault(part_of(path), set()).add(label)
    assert all(len(values) == 1 for values in parts.values())
    return {part: values.pop() for part, values in parts.items()}


def test_rules_that_match_nothing_raise(model):
    for make in (finetune.train_only, finetune.freeze):
        with pytest.raises(tree.RuleError, match="meets no leaf"):
            make(model, "encodr/.*")


def test_freeze_is_the_complement_of_train_only(model):
    chosen = finetune.train_only(model, ".*/bias")
    chex.assert_trees_all_equal(
        tree.add(chosen, finetune.freeze(model, ".*/bias")), finetune.train_all(model)
    )
    assert tree.flatten(chosen)["encoder/layer_1/mlp/output/bias"] == 1.0


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize(
    ("rule", "torch_key"),
    [
        (".*/bias|head/.*", r".*\.bias"),
        (
            ".*norm/(scale|bias)|head/.*",
            r"(?i)(.*\.)?(\w*(norm|bn|grn)\w*|ln_\w+|downsampling_layer\.0)\.(weight|bias)",
        ),
    ],
)
def test_the_rules_of_bitfit_and_norm_tuning_fit_every_architecture(name, rule, torch_key):
    """They meet the leaves that the torch files call biases, or weights and biases of norms, and the head."""
    tensors = ARCHITECTURES[name].tensors(ARCHITECTURES[name].config())
    keys = {
        path.removeprefix("params/"): tensor.key
        for path, tensor in tensors.items()
        if path.startswith("params/")
    }
    labels = tree.flatten(finetune.train_only(named([*keys, "head/out/kernel"]), rule))
    assert labels.pop("head/out/kernel") == 1.0
    met = {path for path, rate in labels.items() if rate}
    assert met == {path for path, key in keys.items() if re.fullmatch(torch_key, key)}
    lacking = ("llama", "mistral", "qwen3", "t5") if rule == ".*/bias|head/.*" else ("vgg",)
    assert bool(met) != (name in lacking)


LORA_PLUS = [(".*/lora/b", 16.0), (".*/lora/.*|head/.*", 1.0), (".*", 0.0)]


def test_lora_plus_on_bert(model):
    adapted = adapters.lora(model, rank=2, key=jax.random.key(0))
    rates = tree.flatten(tree.assign(LORA_PLUS, adapted.params))
    assert {path: rate for path, rate in rates.items() if rate} == {
        f"encoder/layer_{i}/attention/{name}/lora/{leaf}": rate
        for i in (0, 1)
        for name in ("query", "value")
        for leaf, rate in (("a", 1.0), ("b", 16.0))
    } | {"head/out/kernel": 1.0, "head/out/bias": 1.0}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_lora_plus_beside_peft():
    """Four updates of AdamW with decay, at the rates that PEFT's LoRA+ optimiser gives A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32)
    ours = linen(Outer(), jax.jit(Outer().init)(jax.random.key(0), x))
    ours = adapters.lora(ours, rank=2, alpha=2.0, where="only", key=jax.random.key(1), batch=jnp.asarray(x))
    leaves = jax.tree.map(np.array, ours.params["only"])

    theirs = torch.nn.ModuleDict({"only": torch.nn.Linear(6, 5)})
    theirs = get_peft_model(theirs, LoraConfig(r=2, lora_alpha=2, target_modules=["only"]))
    layer = theirs.base_model.model["only"]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(leaves["kernel"].T))
        layer.base_layer.bias.copy_(torch.tensor(leaves["bias"]))
        layer.lora_A["default"].weight.copy_(torch.tensor(leaves["lora"]["a"].T))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    step = make_step(
        Square(),
        optax.adamw(1e-2, weight_decay=0.1),
        tree.assign([*LORA_PLUS[:1], (".*/lora/.*", 1.0), LORA_PLUS[2]], ours.params),
    )
    state = step.init(ours, jax.random.key(0))
    for _ in range(4):
        optimizer.zero_grad()
        ((layer(torch.tensor(x)) - torch.tensor(target)) ** 2).mean().backward()
        optimizer.step()
        state, _ = step(state, {"x": x, "target": target})
    lora = state.model.params["only"]["lora"]
    np.testing.assert_allclose(lora["a"], layer.lora_A["default"].weight.detach().numpy().T, atol=1e-5)
    np.testing.assert_allclose(lora["b"], layer.lora_B["default"].weight.detach().numpy().T, atol=1e-5)
    assert np.abs(lora["b"]).min() > 0.1  # 16 times as far as A can go


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="only")(x)


class Square(Loss):
    def value(self, model, outputs, batch, key):
        return jnp.square(outputs["features"] - batch["target"]).mean(), {}


def test_layerwise_rates_of_bert(model):
    assert by_part(finetune.layerwise(model, 0.5)) == {
        "embeddings": 0.125, "encoder/layer_0": 0.25, "encoder/layer_1": 0.5,
        "pooler": 0.5, "head": 1.0,
    }  # fmt: skip


def test_depth_of_efficientnet_lite():
    config = VARIANTS["efficientnet-lite0"]
    shapes = jax.eval_shape(EfficientNetLite(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    model = Model(dict(shapes), Linen(EfficientNetLite(config)), config=config)
    depth = {path.split("/")[0]: d for path, d in tree.flatten(finetune.depths(model)).items()}
    assert depth["stem"] == depth["stem_norm"] == 0
    assert [depth[f"layer_{i}"] for i in range(16)] == list(range(1, 17))
    assert depth["last"] == depth["last_norm"] == 16


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        # ViT and its like: tokens and positions are inputs, the final norm belongs to the last layer.
        (["cls_token", "position_embedding", "patch_embed/kernel", "layer_0/w", "layer_1/w", "norm/scale"],
         [0, 0, 0, 1, 2, 2]),
        # Stages of blocks: outer number first; numbers inside a layer do not count; ten comes after nine.
        (["stem", "stage_0/block_0/conv_7", "stage_0/block_1/conv_0", "stage_1/block_0/conv_0"], [0, 1, 2, 3]),
        (["layer_9/w", "layer_10/w"], [0, 1]),
    ],
)  # fmt: skip
def test_depth_from_paths(paths, expected):
    model = named(paths)
    depth = tree.flatten(finetune.depths(model))
    assert [depth[path] for path in paths] == expected


@pytest.mark.parametrize("paths", [["a/w", "b/w"], ["left/layer_0/w", "right/layer_0/w"]])
def test_unclear_depth_asks_for_groups(paths):
    with pytest.raises(ValueError, match="pass groups="):
        finetune.depths(named(paths))


def test_groups_must_cover_all(model):
    with pytest.raises(tree.RuleError, match="no rule covers"):
        finetune.layerwise(model, 0.5, groups=["embeddings/.*", "head/.*"])


def test_gradual_unfreezing_frees_from_the_top_in_one_compilation(model, batch):
    labels = finetune.gradual_unfreezing(model, every=2)
    step = make_step(Classify(), optax.adamw(1e-2, weight_decay=0.1), labels)
    step._compiled = jax.jit(chex.assert_max_traces(step.update, n=1), donate_argnums=0)
    state = step.init(model, jax.random.key(0))
    order = ["head", "encoder/layer_1", "encoder/layer_0", "embeddings"]
    for update in range(2 * len(order)):
        before = jax.tree.map(np.asarray, state.model.params)
        state, _ = step(state, batch)
        moved = tree.map_with_path(lambda _, a, b: bool((a != b).any()), before, state.model.params)
        free = set(order[: update // 2 + 1]) | ({"pooler"} if update >= 2 else set())
        assert {part_of(path) for path, m in tree.flatten(moved).items() if m} == free
    chex.assert_trees_all_equal(
        finetune.gradual_unfreezing(model, 2)["head"], {"out": {"bias": 1.0, "kernel": 1.0}}
    )


def test_gradual_unfreezing_at_layerwise_rates(model):
    labels = tree.flatten(finetune.gradual_unfreezing(model, every=3, rates=finetune.layerwise(model, 0.5)))
    schedule = labels["encoder/layer_1/mlp/output/kernel"]
    assert [float(schedule(step)) for step in (0, 2, 3, 100)] == [0, 0, 0.5, 0.5]


def test_put_head_makes_the_model_the_probe(model, batch):
    kernel, bias = np.arange(32.0).reshape(16, 2), np.array([1.0, -1.0])
    probed = finetune.put_head(model, kernel, bias)
    expected = np.asarray(model(batch)["pooled"]) @ kernel + bias
    np.testing.assert_allclose(probed(batch)["logits"], expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(tree.remove("head/.*", probed.params), tree.remove("head/.*", model.params))
    assert tree.diff(model.params, probed.params) == []


def test_put_head_refuses_what_no_probe_solves(model):
    with pytest.raises(ValueError, match=r"head/out/kernel has shape \(16, 2\), the given one \(16, 3\)"):
        finetune.put_head(model, np.zeros((16, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="no head 'other'"):
        finetune.put_head(model, np.zeros((16, 2)), np.zeros(2), name="other")
    hidden = heads.attach(
        model, heads.Classifier(2, hidden=True), on="pooled", width=16, key=jax.random.key(3)
    )
    with pytest.raises(ValueError, match=r"layers \['dense', 'out'\]"):
        finetune.put_head(hidden, np.zeros((16, 2)), np.zeros(2))
    plain = heads.attach(model, heads.Classifier(2, bias=False), on="pooled", width=16, key=jax.random.key(3))
    with pytest.raises(ValueError, match="head 'head' has no bias"):
        finetune.put_head(plain, np.zeros((16, 2)), np.zeros(2))
