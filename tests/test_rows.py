"""Weighted means divide by the sum of the weights, whatever its size; padding has no influence on value or gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import rows
from jtl.model import linen
from jtl.tasks import CTC, CausalLM, Classify, Dice, FlowMatching, Segment, Seq2Seq, Spans


@pytest.mark.parametrize("shape", [(7,), (7, 3), (4, 5, 2)])
@pytest.mark.parametrize("axes", [1, 2])
def test_mean_is_numpys_average(shape, axes):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(np.float32)
    weight = rng.random(shape[: min(axes, len(shape))]).astype(np.float32)
    flat = values.reshape(weight.size, -1)
    expected = np.average(flat, axis=0, weights=weight.ravel()).reshape(shape[weight.ndim :])
    for scale in (1.0, 1e-3, 40.0):
        np.testing.assert_allclose(
            rows.mean(jnp.asarray(values), scale * jnp.asarray(weight)), expected, rtol=2e-5, atol=1e-6
        )
    padded = jnp.concatenate([jnp.asarray(values), jnp.full((2, *shape[1:]), jnp.nan)])
    zeros = jnp.concatenate([jnp.asarray(weight), jnp.zeros((2, *weight.shape[1:]))])
    np.testing.assert_allclose(rows.mean(padded, zeros), expected, rtol=2e-5, atol=1e-6)
    gradient = jax.grad(lambda v: rows.mean(v, zeros).sum())(padded)
    assert np.isfinite(gradient[:-2]).all() and (gradient[-2:] == 0).all()
    assert (rows.mean(padded, 0 * zeros) == 0).all()
    np.testing.assert_allclose(rows.mean(jnp.asarray(values)), values.mean(), rtol=1e-5)


def test_cross_entropy_and_its_smoothing():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(
        rows.cross_entropy(logits, jnp.array([0, 2])), -log_p[[0, 1], [0, 2]], rtol=1e-6
    )
    smooth = rows.cross_entropy(logits, jnp.array([0, 2]), 0.3)
    target = 0.7 * np.eye(3)[[0, 2]] + 0.1
    np.testing.assert_allclose(smooth, -(target * log_p).sum(1), rtol=1e-6)
    assert np.isnan(rows.cross_entropy(logits, jnp.array([-1, 3]))).all()


B, L, C = 4, 5, 6
TOKENS = np.random.default_rng(1).integers(0, C, (B, L)).astype(np.int32)
LOGITS = jax.random.normal(jax.random.key(2), (B, L, C))
MASK = np.ones((B, L), np.int32)
IMAGE = jax.random.normal(jax.random.key(3), (B, 4, 4, C))
LOSSES = {
    "classify": (Classify(), {"logits": LOGITS[:, 0]}, {"label": TOKENS[:, 0]}),
    "causal": (CausalLM(), {"token_logits": LOGITS}, {"input_ids": TOKENS, "attention_mask": MASK}),
    "seq2seq": (Seq2Seq(), {"token_logits": LOGITS}, {"labels": TOKENS}),
    "spans": (
        Spans(),
        {"span_logits": LOGITS[..., :2]},
        {"start": TOKENS[:, 0] % L, "end": TOKENS[:, 1] % L, "attention_mask": MASK},
    ),
    "ctc": (CTC(), {"token_logits": LOGITS}, {"labels": 1 + TOKENS[:, :2] % (C - 1)}),
    "segment": (Segment(), {"pixel_logits": IMAGE}, {"mask": TOKENS[:, :4, None].repeat(4, 2)[:, :4]}),
    "dice": (Dice(), {"pixel_logits": IMAGE}, {"mask": TOKENS[:, :4, None].repeat(4, 2)[:, :4]}),
    "flow": (FlowMatching(), {"velocity": IMAGE, "flow": {"target": jnp.ones_like(IMAGE)}}, {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_divides_by_the_sum_of_the_weights(name):
    """Half the weight for every row changes nothing; one row of a small weight alone counts fully; none gives 0."""
    import flax.linen as nn

    loss, outputs, batch = LOSSES[name]
    model = linen(nn.Dense(1), {"params": {}})

    def value(weight):
        fields = jax.tree.map(jnp.asarray, {**batch, "weight": weight})
        return loss.value(model, outputs, fields, None)[0]

    weight = np.array([1.0, 0.5, 0.0, 0.25], np.float32)
    np.testing.assert_allclose(value(0.01 * weight), value(weight), rtol=1e-4)
    alone = [value(np.eye(B, dtype=np.float32)[i]) for i in range(B)]
    np.testing.assert_allclose(value(0.1 * np.eye(B, dtype=np.float32)[1]), alone[1], rtol=1e-4)
    if name not in (
        "causal",
        "seq2seq",
        "dice",
        "segment",
    ):  # where rows hold different numbers of tokens or pixels
        np.testing.assert_allclose(value(weight), np.average(alone, weights=weight), rtol=1e-4)
    if name != "dice":
        assert value(np.zeros(B, np.float32)) == 0
