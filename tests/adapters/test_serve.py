"""Rows with adapters of their own: each is that row through its own model, at the cost of one forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, tree
from jtl import model as models
from jtl.loss import Loss
from jtl.models import ARCHITECTURES
from jtl.models.bert import BertConfig
from jtl.tasks import Classify
from jtl.train import make_step, run_of, sweep

WHICH = np.array([2, 0, 1, 0, 2], np.int32)
B, L, D = len(WHICH), 16, 12  # more positions than rows of W: a layer of one model alone folds W + A·B
CONFIG = BertConfig(
    vocab_size=40, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
    max_position_embeddings=32,
)  # fmt: skip
IDS = np.arange(B * L, dtype=np.int32).reshape(B, L) % 40
TEXT = {
    "input_ids": IDS,
    "attention_mask": np.array(np.arange(L)[None] < 6 + 2 * np.arange(B)[:, None], np.int32),
}
LORA = r".*/lora/.*|head/.*"


@pytest.fixture(scope="module")
def bert():
    architecture = ARCHITECTURES["bert"]
    module = architecture.module(CONFIG)
    variables = jax.jit(module.init)(jax.random.key(0), **architecture.example(CONFIG))
    return models.linen(module, variables).replace(config=CONFIG)


class Conv(nn.Module):
    """Strided and grouped convolutions, batch normalisation, and a stack of dense layers."""

    @nn.compact
    def __call__(self, image, *, train: bool = False, use_running_average: bool = True):
        x = nn.Conv(6, (3, 3), strides=2, name="conv")(image)
        x = nn.relu(nn.BatchNorm(use_running_average, name="norm")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(x, None)
        return {"features": x.mean((1, 2))}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.gelu(nn.Dense(6, name="dense")(x)), None


@pytest.fixture(scope="module")
def conv():
    image = jax.random.normal(jax.random.key(4), (B, 8, 8, 3))
    variables = jax.jit(Conv().init)(jax.random.key(3), image)
    variables["batch_stats"]["norm"]["mean"] += 0.1
    return models.linen(Conv(), variables), {"image": image}


def stirred(model, own, seed):
    """The model with noise on its own leaves."""
    mask = tree.matches(own, model.params)
    draw = np.random.default_rng(seed)

    def noise(leaf, chosen):
        return leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype) if chosen else leaf

    return model.with_params(jax.tree.map(noise, model.params, mask))


def with_adapters(base, insert, own, count=3, features=D, **options):
    """Models of one backbone, whose adapters and heads are their own."""
    model = heads.classifier(base, 3, key=jax.random.key(0), on="features", width=features)
    model = insert(model, key=jax.random.key(0), **options)
    return [stirred(model, own, seed) for seed in range(count)]


@jax.jit
def logits(model, batch):
    return model(batch)["logits"]


def rows_alone(made, batch, which=WHICH):
    """Row i through ``made[which[i]]`` alone."""
    alone = [logits(model, batch) for model in made]
    return np.stack([np.asarray(alone[k][i]) for i, k in enumerate(which)])


INSERTED = {
    "lora": dict(insert=adapters.lora, rank=2, where=".*/(query|value|mlp/output)"),
    "lora_embedding": dict(insert=adapters.lora, rank=2, where="embeddings/word"),
    "dora": dict(insert=adapters.dora, rank=2),
    "vera": dict(insert=adapters.vera, rank=4),
    "ia3": dict(insert=adapters.ia3),
    "loha": dict(insert=adapters.loha, rank=2),
    "bottleneck": dict(insert=adapters.bottleneck, width=2),
    "prompt": dict(insert=adapters.prompt, length=3),
}


@pytest.mark.parametrize("case", INSERTED)
def test_each_row_of_bert_is_that_row_through_its_own_model(bert, case):
    own = f".*/{case.split('_')[0]}/.*|head/.*"
    made = with_adapters(bert, own=own, **INSERTED[case])
    found = logits(adapters.serve(made, own=own), {**TEXT, "adapter": WHICH})
    expected = rows_alone(made, TEXT)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - rows_alone(made, TEXT, (WHICH + 1) % 3)).max() > 1e-2  # adapters do differ


def test_each_row_of_a_conv_model(conv):
    base, batch = conv
    own = LORA
    made = with_adapters(
        base, adapters.lora, own, features=6, rank=2, where="conv|grouped|layers/dense", batch=batch["image"]
    )
    found = logits(adapters.serve(made, own=own), {**batch, "adapter": WHICH})
    np.testing.assert_allclose(found, rows_alone(made, batch), atol=1e-5)


@pytest.fixture(scope="module")
def made(bert):
    return with_adapters(bert, own=LORA, **INSERTED["lora"])


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(6, name="first")(x)))
        return {"features": nn.Dense(4, name="second")(x)}


ROWS = {"x": np.float32(np.random.default_rng(1).normal(size=(B, 3)))}


@pytest.fixture(scope="module")
def small():
    """Four models."""
    base = models.linen(Small(), Small().init(jax.random.key(0), ROWS["x"]))
    insert = dict(rank=2, where="first|second", batch=ROWS)
    return with_adapters(base, adapters.lora, LORA, count=4, features=4, **insert)


def test_taps_and_modes(small):
    served = adapters.serve(small, own=LORA)
    batch = {**ROWS, "adapter": np.zeros(B, np.int32)}
    tap = "first"
    tapped = jax.jit(lambda model, batch: model(batch, taps=(tap,))["taps"][tap])
    np.testing.assert_allclose(tapped(served, batch), tapped(small[0], ROWS), atol=1e-5)
    same = {**jax.tree.map(lambda x: x[:1].repeat(2, 0), ROWS), "adapter": np.zeros(2, np.int32)}
    training = jax.jit(lambda model, batch: model(batch, train=True, key=jax.random.key(0))["logits"])
    one, two = training(served, same)
    assert np.abs(one - two).max() > 1e-3  # each row drops its own
    with pytest.raises(ValueError, match="share no batch statistics: ask for stats='running'"):
        served(batch, stats="batch")


@pytest.mark.slow
def test_one_forward_of_the_backbone_and_no_weight_for_each_row(bert):
    """Compiled FLOPs at rank 8 are those of the plain model and the factors'; W + A·B never has a row's axis."""
    config = BertConfig(
        vocab_size=40, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=320
    )
    module = ARCHITECTURES["bert"].module(config)
    ids = jnp.zeros((B, 160), jnp.int32)  # above 128 positions a row alone would fold
    variables = jax.jit(module.init)(jax.random.key(0), ids)
    plain = heads.classifier(models.linen(module, variables).replace(config=config), 3, key=jax.random.key(0))
    adapted = adapters.lora(plain, rank=8, key=jax.random.key(0))
    served = adapters.serve([adapted] * 3, own=LORA)
    batch = {"input_ids": ids, "adapter": WHICH}
    flops = lambda model: logits.lower(model, batch).compile().cost_analysis()["flops"]  # noqa: E731
    assert flops(plain) < flops(served) <= 1.1 * flops(plain)
    row_weight = f"f32[{B},128,128]"
    assert row_weight not in str(jax.make_jaxpr(logits)(served, batch))
    # It would be there if the layers were not told that they are served.
    folding = served.replace(techniques=(*adapted.techniques, served.techniques[-1]))
    assert row_weight in str(jax.make_jaxpr(logits)(folding, batch))


def test_an_index_outside(made):
    served = adapters.serve(made, own=LORA)
    outside = np.array([0, 3, 1, -1, 2], np.int32)
    with pytest.raises(
        ValueError, match=r"batch\['adapter'\] has \[-1, 3\]; the model serves the adapters 0 to 2"
    ):
        served({**TEXT, "adapter": outside})
    found = np.asarray(logits(served, {**TEXT, "adapter": outside}))
    np.testing.assert_array_equal(np.isnan(found).all(-1), [False, True, False, True, False])
    expected = rows_alone(made, TEXT, np.clip(outside, 0, 2))
    np.testing.assert_allclose(found[[0, 2, 4]], expected[[0, 2, 4]], atol=1e-5)


def test_bad_batches(made):
    served = adapters.serve(made, own=LORA)
    with pytest.raises(
        KeyError, match="serves 3 adapters and needs the batch field 'adapter'.*attention_mask"
    ):
        served(TEXT)
    with pytest.raises(KeyError, match=r"the batch has \[\'input_ids\'\]"):
        served(jnp.asarray(IDS))
    with pytest.raises(ValueError, match=r"must be integers \(B,\), found float32\[5\]"):
        served({**TEXT, "adapter": WHICH.astype(np.float32)})
    with pytest.raises(ValueError, match=r"must be integers \(B,\), found int32\[\]"):
        served({**TEXT, "adapter": np.int32(1)})
    with pytest.raises(ValueError, match=r"has 3 rows, but 'attention_mask' the shape \(5, 16\)"):
        served({**TEXT, "adapter": WHICH[:3]})


def test_swap_replaces_one_adapter_without_a_new_compilation(small):
    traces = []

    @jax.jit
    def forward(model, batch):
        traces.append(1)
        return model(batch)["logits"]

    batch = {**ROWS, "adapter": WHICH}
    served = adapters.serve(small[:3], own=LORA)
    before = forward(served, batch)
    new = small[3]
    swapped = adapters.swap(served, 1, new)
    after = forward(swapped, batch)
    assert len(traces) == 1
    np.testing.assert_array_equal(after[WHICH != 1], before[WHICH != 1])
    np.testing.assert_allclose(after[WHICH == 1], logits(new, ROWS)[WHICH == 1], atol=1e-5)
    assert np.abs(after[WHICH == 1] - before[WHICH == 1]).max() > 1e-2
    # Alone too: what differs is leaves.
    forward(small[0], ROWS)
    forward(small[1], ROWS)
    assert len(traces) == 2
    with pytest.raises(ValueError, match="adapter 3: the model serves the adapters 0 to 2"):
        adapters.swap(served, 3, new)
    plain = new.replace(techniques=new.techniques[:1])
    with pytest.raises(ValueError, match="the new model computes another function"):
        adapters.swap(served, 0, plain)


class Counted(Loss):
    """Counts its traces."""

    def value(self, model, outputs, batch, key):
        TRACES.append(1)
        return (outputs["logits"] ** 2).mean(), {}


TRACES = []


def test_one_compiled_step_trains_any_adapter_of_a_form(small):
    step = make_step(Counted(), optax.sgd(0.1), finetune.train_only(small[0], LORA))
    losses = [step(step.init(model, jax.random.key(0)), ROWS)[1]["loss"] for model in small[:2]]
    assert len(TRACES) == 1 and losses[0] != losses[1]


def test_pick_gives_back_what_was_served(made):
    served = adapters.serve(made, own=LORA)
    for i, model in enumerate(made):
        picked = adapters.pick(served, i)
        assert picked.replace(variables={}) == model.replace(variables={})
        jax.tree.map(np.testing.assert_array_equal, picked.variables, model.variables)
    with pytest.raises(
        ValueError, match=r"serves many adapters 'lora': merge one, jtl.adapters.pick\(model, i\)"
    ):
        adapters.merge(served)
    with pytest.raises(ValueError, match="serves no adapters: make one by jtl.adapters.serve"):
        adapters.pick(made[0], 0)
    with pytest.raises(ValueError, match=r"serves many adapters already: serve \[pick\(model, i\)"):
        adapters.serve([served], own=LORA)


class Total(Loss):
    """A sum over rows, so that the rows of each adapter add up to its own."""

    def mode(self):
        return models.Mode()

    def value(self, model, outputs, batch, key):
        return (outputs["logits"] ** 2).sum(), {}


def test_mixed_rows_train_each_its_own_adapter(small):
    """The gradient of a stack is each adapter's from its rows alone; one without rows gets zero."""
    which = np.array([0, 2, 2, 0, 2], np.int32)
    served = adapters.serve(small[:3], own=LORA)

    @jax.jit
    def gradient(model, batch):
        value = lambda params: Total()(model.with_params(params), batch, None)[0]  # noqa: E731
        return tree.flatten(jax.grad(value)(model.params))

    mixed = gradient(served, {**ROWS, "adapter": which})
    mask = tree.flatten(tree.matches(LORA, served.params))
    for i, model in enumerate(small[:3]):
        rows = jax.tree.map(lambda x, i=i: x[which == i], ROWS)
        alone = gradient(model, rows) if (which == i).any() else None
        for path in (path for path in mask if mask[path]):
            expected = np.zeros_like(mixed[path][i]) if alone is None else alone[path]
            size = np.abs(mixed[path]).max()
            np.testing.assert_allclose(mixed[path][i], expected, atol=1e-5 * size, rtol=1e-4, err_msg=path)
            assert size > 0


def test_the_runs_of_a_sweep_can_be_served(small):
    start = small[:2]
    runs = sweep(make_step(Classify(), optax.adam(1e-2), finetune.train_only(start[0], LORA)))
    state = runs.init(start, jax.random.split(jax.random.key(1), 2))
    state, _ = runs(state, {**ROWS, "label": np.arange(B, dtype=np.int32) % 3})
    trained = [run_of(state, i).model for i in range(2)]
    which = np.array([1, 0, 1, 1, 0], np.int32)
    found = logits(adapters.serve(trained, own=LORA), {**ROWS, "adapter": which})
    np.testing.assert_allclose(found, rows_alone(trained, ROWS, which), atol=1e-5)
    assert np.abs(found - rows_alone(start, ROWS, which)).max() > 1e-3


def test_what_cannot_be_served_together(made, bert):
    with pytest.raises(ValueError, match="at least one model"):
        adapters.serve([], own=LORA)
    with pytest.raises(tree.RuleError, match="meets no leaf"):
        adapters.serve(made, own="ia3/.*")
    with pytest.raises(
        ValueError, match=r"model 1 differs .* in 2 leaves that own='.\*/lora/.\*' .* 'params/head/out"
    ):
        adapters.serve(made, own=".*/lora/.*")
    with pytest.raises(ValueError, match="model 1 computes another function"):
        adapters.serve([made[0], bert], own=LORA)
    head = {"head": {"out": {"kernel": jnp.zeros((D, 4))}}}
    other = made[1].with_params(tree.overlay(made[1].params, head, replace=True))
    with pytest.raises(
        ValueError, match=r"model 1 has other leaves .* ~ params/head/out/kernel: .*\[12,3\] -> .*\[12,4\]"
    ):
        adapters.serve([made[0], other], own=LORA)
    vera = [adapters.vera(bert, rank=4, key=jax.random.key(i)) for i in range(2)]
    with pytest.raises(ValueError, match="leaves that own=.* does not meet, such as 'vera/shared_a'"):
        adapters.serve(vera, own=".*/vera/.*")
