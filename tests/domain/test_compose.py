"""Three slots at once: an adversary and LoRA (leaves), layer-wise rates (labels), several terms (loss)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, domain, finetune, heads, sharding, tree
from jtl.model import linen
from jtl.models.bert import Bert, BertConfig
from jtl.tasks import Classify
from jtl.train import make_step

KEY = jax.random.key(0)
B = 16


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    place = (np.arange(B) % 2).astype(np.int32)
    label = (np.arange(B) // 2 % 2).astype(np.int32)
    ids = rng.integers(1, 20, (B, 6)) + 20 * label[:, None] + 5 * place[:, None]
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones((B, 6), jnp.int32),
        "label": jnp.asarray(np.where(place == 0, label, -1), jnp.int32),
        "domain": jnp.asarray(place),
    }


@pytest.fixture(scope="module")
def model():
    config = BertConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = jnp.ones((1, 6), jnp.int32)
    bert = linen(Bert(config), Bert(config).init(KEY, ids)).replace(config=config)
    return heads.classifier(bert, 2, key=KEY, dropout=0.0)


@pytest.mark.slow
def test_dann_on_a_lora_model_under_layerwise_rates(model, batch):
    start = adapters.lora(model, rank=2, key=KEY)
    start = domain.adversary(start, horizon=20, key=KEY, hidden=(16,))
    own = tree.matches(".*/lora/.*|head/.*|discriminator/.*", start.params)
    labels = jax.tree.map(lambda rate, ours: rate * ours, finetune.layerwise(start, 0.5), own)
    assert {round(rate, 3) for rate in jax.tree.leaves(labels)} == {0.0, 0.25, 0.5, 1.0}
    loss = domain.Source(Classify()) + 0.5 * domain.DANN() + 0.1 * domain.CORAL()
    traced = chex.assert_max_traces(n=1)(lambda model, batch, key: loss(model, batch, key))
    chex.clear_trace_counter()
    step = make_step(traced, optax.adam(0.1), labels)
    state = step.init(start, KEY)
    seen = []
    for _ in range(20):
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    assert all(np.isfinite(value) for row in seen for value in row.values())
    assert seen[-1]["Source"] < 0.85 * seen[0]["Source"]
    np.testing.assert_allclose(
        seen[0]["loss"], seen[0]["Source"] + 0.5 * seen[0]["DANN"] + 0.1 * seen[0]["CORAL"]
    )
    assert seen[0]["reversal"] == 0 and seen[-1]["reversal"] > 0.99
    before = tree.flatten(start.params)
    for path, leaf in tree.flatten(state.model.params).items():
        assert bool((leaf == before[path]).all()) == (tree.flatten(labels)[path] == 0), path


@pytest.mark.slow
def test_a_step_over_eight_devices_is_that_over_one(model, batch):
    start = domain.adversary(model, horizon=20, key=KEY, hidden=(16,))
    loss = domain.Source(Classify()) + domain.DANN() + domain.DAN()
    found = []
    for devices in (None, sharding.make_mesh()):
        step = make_step(loss, optax.sgd(0.1), mesh=devices)
        state, _ = step(step.init(start, KEY), batch)
        found.append(jax.tree.map(np.asarray, state.model.variables))
    chex.assert_trees_all_close(*found, atol=1e-5)


def test_a_dann_step_costs_hardly_more_than_a_supervised_one():
    config = BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=1536, max_position_embeddings=64)  # fmt: skip
    shapes = {name: jax.ShapeDtypeStruct((B, 64), jnp.int32) for name in ("input_ids", "attention_mask")}
    shapes |= {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in ("label", "domain")}

    def build(adversary):
        ids = jnp.ones((1, 4), jnp.int32)
        bert = linen(Bert(config), Bert(config).init(KEY, ids)).replace(config=config)
        model = heads.classifier(bert, 2, key=KEY)
        return domain.adversary(model, horizon=9, key=KEY) if adversary else model

    flops = []
    for adversary, loss in ((False, Classify()), (True, domain.Source(Classify()) + domain.DANN())):
        lowered = make_step(loss, optax.sgd(0.1)).lower(jax.eval_shape(lambda a=adversary: build(a)), shapes)
        flops.append(lowered.cost_analysis()["flops"])
    assert 1 < flops[1] / flops[0] < 1.1


LOSSES = {
    "adversarial": (domain.DANN() + 0.1 * domain.MDD() + 1e-4 * domain.BSP(), True),
    "discrepancy": (
        domain.DAN() + domain.JAN() + domain.CORAL() + domain.AFN() + domain.MCC() + domain.JDOT(),
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("name", LOSSES)
def test_every_step_compiles_for_a_tpu_slice(model, slice_2x2, name):
    loss, adversarial = LOSSES[name]
    if adversarial:
        model = domain.adversary(model, horizon=9, key=KEY, hidden=(16,))
        model = domain.adversary(
            model, horizon=9, key=KEY, hidden=(16,), outputs=2, name="adversary", output="adversary_logits"
        )
    shapes = {name: jax.ShapeDtypeStruct((B, 6), jnp.int32) for name in ("input_ids", "attention_mask")}
    shapes |= {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in ("label", "domain")}
    step = make_step(domain.Source(Classify()) + loss, optax.sgd(0.1), mesh=slice_2x2)
    assert step.lower(model, shapes).compile().cost_analysis()["flops"] > 0
