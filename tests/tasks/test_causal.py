import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.tasks import CausalLM
from jtl.wrap import function

B, L, V, D = 4, 6, 11, 5


def net(params, input_ids):
    """Each token sees the mean of those up to it."""
    x = params["table"][input_ids]
    x = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1)[None, :, None]
    return {"token_logits": jnp.tanh(x @ params["kernel"]) @ params["table"].T}


@pytest.fixture(scope="module")
def model():
    one, two = jax.random.split(jax.random.key(0))
    params = {"table": jax.random.normal(one, (V, D)), "kernel": jax.random.normal(two, (D, D))}
    return function(net, params)


@pytest.fixture(scope="module")
def batch():
    """Rows padded on the right, on the left, not at all; and one that does not count."""
    mask = np.ones((B, L), np.int32)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    ids = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "weight": np.array([1, 1, 1, 0], np.float32)}


def test_against_numpy(model, batch):
    value, aux = jax.jit(CausalLM())(model, batch, None)
    logits = np.asarray(model(batch)["token_logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs = [(0, t) for t in range(3)] + [(1, t) for t in range(2, 5)] + [(2, t) for t in range(5)]
    ids = batch["input_ids"]
    np.testing.assert_allclose(value, -np.mean([log_p[b, t, ids[b, t + 1]] for b, t in pairs]), rtol=1e-5)
    hits = np.mean([log_p[b, t].argmax() == ids[b, t + 1] for b, t in pairs])
    np.testing.assert_allclose(aux.metrics["token_accuracy"], hits, rtol=1e-6)
    assert float(aux.metrics["tokens"]) == len(pairs)


def test_what_stands_in_padding_changes_nothing(model, batch):
    ids = np.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    ids[1] = batch["input_ids"][1]  # this toy reads what is left of a token, padding too
    loss = jax.jit(lambda m, b: CausalLM()(m, b, None)[0])
    assert float(loss(model, batch)) == float(loss(model, batch | {"input_ids": ids}))
    bare = {"input_ids": batch["input_ids"]}
    ones = bare | {"attention_mask": np.ones((B, L), np.int32), "weight": np.ones(B, np.float32)}
    assert float(loss(model, bare)) == float(loss(model, ones))
    gradient = jax.grad(loss)(model, batch | {"weight": np.zeros(B, np.float32)})
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient))


def test_it_adds_up(model, batch):
    one = CausalLM()(model, batch, None)[0]
    two, aux = (CausalLM() + 0.5 * CausalLM())(model, batch, None)
    np.testing.assert_allclose(two, 1.5 * one, rtol=1e-6)
    assert {"CausalLM", "CausalLM_2", "token_accuracy_2"} <= set(aux.metrics)


def test_errors(batch):
    given = function(lambda params, logits: {"token_logits": logits}, {})
    logits = jnp.zeros((B, L, V))
    outside = batch | {"logits": logits, "input_ids": np.full((B, L), V, np.int32)}
    assert np.isnan(CausalLM()(given, outside, None)[0])
    with pytest.raises(ValueError, match=r"token_logits \(B, L, V\)"):
        CausalLM()(given, batch | {"logits": logits[:, :3]}, None)
    other = function(lambda params, input_ids: input_ids, {})
    with pytest.raises(KeyError, match="gives \\['features'\\]"):
        CausalLM()(other, batch, None)


def test_a_mask_chooses_what_is_learned(model, batch):
    answer = np.zeros((B, L), np.int32)
    answer[0, 2] = answer[1, 3] = answer[2, 3:5] = 1
    loss = CausalLM(mask="continuation")
    value, aux = jax.jit(loss)(model, batch | {"continuation": answer}, None)
    logits = np.asarray(model(batch)["token_logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs = [(0, 2), (1, 3), (2, 3), (2, 4)]
    np.testing.assert_allclose(
        value, -np.mean([log_p[b, t, batch["input_ids"][b, t + 1]] for b, t in pairs]), rtol=1e-5
    )
    assert float(aux.metrics["tokens"]) == 4
    with pytest.raises(KeyError, match="mask='continuation'.*the batch has"):
        loss(model, batch, None)
