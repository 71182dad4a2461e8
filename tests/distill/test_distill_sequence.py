"""Token by token: divergences in NumPy, their limits, masks, and a teacher of which the top k were cached."""

import distill_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import distill
from jtl.wrap import function

B, L, V = 3, 4, 6
rng = np.random.default_rng(1)
S, T = (jnp.asarray(rng.normal(size=(B, L, V)) * 2, jnp.float32) for _ in range(2))
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
REAL = np.argwhere(np.asarray(MASK))


def oracle(divergence, temperature=1.0):
    rows = [
        divergence(oracles.softmax(S[i, j], temperature), oracles.softmax(T[i, j], temperature))
        for i, j in REAL
    ]
    return temperature**2 * np.mean(rows)


def jsd(beta):
    def divergence(s, t):
        m = beta * t + (1 - beta) * s
        return beta * oracles.kl(t, m) + (1 - beta) * oracles.kl(s, m)

    return divergence


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_divergences(temperature):
    kwargs = {"mask": MASK, "temperature": temperature}
    found = [
        distill.forward_kl(S, T, **kwargs),
        distill.reverse_kl(S, T, **kwargs),
        distill.generalised_jsd(S, T, **kwargs, beta=0.3),
    ]
    divergences = [lambda s, t: oracles.kl(t, s), oracles.kl, jsd(0.3)]
    np.testing.assert_allclose(found, [oracle(d, temperature) for d in divergences], rtol=2e-4)
    assert len({round(float(value), 4) for value in found}) == 3


def test_the_limits_of_the_generalised_jsd():
    near = 1e-3
    for beta, limit in ((near, distill.forward_kl), (1 - near, distill.reverse_kl)):
        found = distill.generalised_jsd(S, T, MASK, beta=beta) / near
        np.testing.assert_allclose(found, limit(S, T, MASK), rtol=0.02)
    symmetric = distill.generalised_jsd(S, T), distill.generalised_jsd(T, S)
    np.testing.assert_allclose(*symmetric, rtol=1e-5)
    for beta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="beta lies between 0 and 1"):
            distill.generalised_jsd(S, T, beta=beta)


@pytest.mark.parametrize("loss", [distill.forward_kl, distill.reverse_kl, distill.generalised_jsd])
def test_a_certain_teacher_gives_a_finite_gradient(loss):
    certain = jnp.where(jnp.arange(V)[None, None] == 2, 300.0, -300.0) * jnp.ones((B, L, 1))
    value, gradient = jax.jit(jax.value_and_grad(loss))(S, certain)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4


def test_masked_positions_have_no_gradient():
    gradient = jax.grad(lambda s: distill.forward_kl(s, T, MASK))(S)
    assert (np.abs(gradient).max(-1) > 0).tolist() == (np.asarray(MASK) > 0).tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_divergence_with_all_other_tokens_as_one(temperature):
    whole = distill.forward_kl(S, T, MASK, temperature)
    previous = 0.0
    for k in (1, 3, V):
        kept, places = distill.top_k(T, k, temperature)
        found = jax.jit(distill.forward_kl_top_k)(S, kept, places, MASK, temperature)

        def coarse(s, t, k=k):
            order = np.argsort(-t)
            cut = [np.append(p[order[:k]], p[order[k:]].sum()) for p in (t, s)]
            return oracles.kl(*cut)

        np.testing.assert_allclose(found, oracle(coarse, temperature), rtol=1e-4)
        assert previous <= found <= whole + 1e-5
        previous = float(found)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    gradients = [
        jax.jit(jax.grad(distill.forward_kl_top_k))(S, kept, places, MASK, temperature),
        jax.jit(jax.grad(distill.forward_kl))(S, T, MASK, temperature),
    ]
    np.testing.assert_allclose(*gradients, atol=1e-5)


def student(params, x):
    return {"token_logits": x + params["shift"][None, None]}


MODEL = function(student, {"shift": jnp.arange(V) / 10})
BATCH = {"x": S, "attention_mask": MASK, "teacher/token_logits": T, "weight": jnp.array([1.0, 1.0, 0.0])}


def test_the_losses_mask_padding_tokens_and_rows():
    # The first row predicts three tokens, the second one; the third is padding.
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    logits = MODEL(BATCH)["token_logits"]
    for loss, expected in (
        (distill.SequenceKD(), distill.forward_kl(logits, T, mask)),
        (distill.SequenceKD("reverse_kl", temperature=2.0), distill.reverse_kl(logits, T, mask, 2.0)),
        (distill.SequenceKD("jsd", beta=0.2), distill.generalised_jsd(logits, T, mask, beta=0.2)),
    ):
        np.testing.assert_allclose(loss(MODEL, BATCH, None)[0], expected, rtol=1e-6)
    own = {**BATCH, "masked": MASK}
    found = distill.SequenceKD(mask="masked")(MODEL, own, None)[0]
    np.testing.assert_allclose(
        found, distill.forward_kl(logits, T, MASK * BATCH["weight"][:, None]), rtol=1e-6
    )
    with pytest.raises(KeyError, match="no field 'masked'"):
        distill.SequenceKD(mask="masked")(MODEL, BATCH, None)
    kept, places = distill.top_k(T, 2)
    cached = {"teacher_top_log_probabilities": kept, "teacher_top_places": places}
    found = distill.TopKSequenceKD()(MODEL, {**BATCH, **cached}, None)[0]
    np.testing.assert_allclose(found, distill.forward_kl_top_k(logits, kept, places, mask), rtol=1e-6)
    with pytest.raises(KeyError, match="teacher_top_log_probabilities"):
        distill.TopKSequenceKD()(MODEL, BATCH, None)


def test_other_lengths_and_vocabularies_are_named():
    kept, places = distill.top_k(T, 2)
    for call, message in (
        (lambda: distill.forward_kl(S, T[:, :3]), "one tokenizer and one padded length"),
        (lambda: distill.reverse_kl(S, T[..., :5]), "vocabulary"),
        (lambda: distill.forward_kl(S, T, MASK[:, :3]), "the mask has shape"),
        (lambda: distill.forward_kl_top_k(S, kept[:, :3], places[:, :3]), "one padded length"),
        (lambda: distill.forward_kl_top_k(S[..., :1], kept, places), "above the student's vocabulary"),
        (lambda: distill.top_k(T, V + 1), "keeps 1 to 6"),
        (
            lambda: distill.SequenceKD()(function(lambda p, x: {"token_logits": x[:, 0]}, {}), BATCH, None),
            "takes token_logits",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert np.isnan(distill.forward_kl_top_k(S, kept, places.at[0, 0, 0].set(V)))
