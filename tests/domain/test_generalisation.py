"""Several labelled domains, none of them the target."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import domain
from jtl.domain.group_dro import reweighted
from jtl.train import make_step

C, K = 3, 3
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def rows(batch):
    """Twelve rows of domains 0 and 2 out of three, all labelled, two of them padding."""
    domains = np.array([0, 2, 0, 0, 2, 2, 0, 2, 0, 0, 2, 0], np.int32)
    return batch | {"domain": jnp.asarray(domains), "label": jnp.arange(12, dtype=jnp.int32) % C}


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def risks(model, rows):
    """NumPy: {domain: mean cross-entropy of its rows that count}."""
    z = np.asarray(model(rows)["logits"], np.float64)
    losses = -log_softmax(z)[np.arange(12), np.asarray(rows["label"])]
    d, w = np.asarray(rows["domain"]), np.asarray(rows["weight"]) > 0
    return {k: losses[(d == k) & w].mean() for k in (0, 2)}


def test_group_dro_moves_its_weights_then_descends(model, rows):
    step_size = 0.7
    weighted = domain.group_weights(model, domains=K, step_size=step_size)
    step = make_step(domain.GroupDRO(), optax.sgd(0.0))
    state = step.init(weighted, KEY)
    r = risks(model, rows)
    q = np.full(K, 1 / K)
    for _ in range(3):
        q = q * np.exp(step_size * np.array([r[0], 0.0, r[2]]))
        q /= q.sum()
        state, metrics = step(state, rows)
        np.testing.assert_allclose(metrics["loss"], q[0] * r[0] + q[2] * r[2], rtol=1e-4)
        np.testing.assert_allclose(state.collections["group_weights"]["q"], q, rtol=1e-4)
    np.testing.assert_allclose(metrics["worst_risk"], max(r.values()), rtol=1e-5)
    # A domain that once weighed nothing stays finite.
    still = reweighted(jnp.array([0.0, 1.0]), jnp.array([5.0, 1.0]), jnp.ones(2), 0.1)
    np.testing.assert_allclose(still, [0.0, 1.0])
    with pytest.raises(KeyError, match="group_weights"):
        domain.GroupDRO()(model, rows, KEY)
    with pytest.raises(ValueError, match="two domains"):
        domain.group_weights(model, domains=1)


def test_irm_against_a_difference_quotient(model, rows):
    z = np.asarray(model(rows)["logits"], np.float64)
    label, d = np.asarray(rows["label"]), np.asarray(rows["domain"])
    w = np.asarray(rows["weight"]) > 0
    total = 0.0
    for k in (0, 2):
        at = (d == k) & w
        risk = lambda scale, at=at: -log_softmax(scale * z[at])[np.arange(at.sum()), label[at]].mean()  # noqa: E731
        slope = (risk(1 + 1e-5) - risk(1 - 1e-5)) / 2e-5
        found = domain.irm_penalty(jnp.asarray(z[at], jnp.float32), jnp.asarray(label[at]))
        np.testing.assert_allclose(found, slope**2, rtol=1e-4)
        total += slope**2
    np.testing.assert_allclose(domain.IRM(domains=K)(model, rows, KEY)[0], total, rtol=1e-4)


def test_vrex_is_the_variance_over_domains_present(model, rows):
    r = risks(model, rows)
    found = domain.VREx(domains=K)(model, rows, KEY)[0]
    np.testing.assert_allclose(found, np.var(list(r.values())), rtol=1e-3)
    np.testing.assert_allclose(domain.vrex(jnp.array([1.0, 2.0, 6.0])), np.var([1, 2, 6]), rtol=1e-6)
    assert float(domain.VREx(domains=1)(model, rows, KEY)[0]) == 0


def test_coral_over_domains_is_the_mean_over_pairs(model, rows):
    three = rows | {"domain": jnp.arange(12, dtype=jnp.int32) % 3, "weight": jnp.ones(12)}
    f = np.asarray(model(three)["features"], np.float64)
    covariances = [np.cov(f[k::3], rowvar=False) for k in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([np.sum((covariances[i] - covariances[j]) ** 2) for i, j in pairs]) / (4 * 6**2)
    np.testing.assert_allclose(domain.CORAL(domains=3)(model, three, KEY)[0], expected, rtol=1e-4)


def test_mixup_mixes_inputs_and_labels_alike(model, rows):
    mixing = domain.with_mixup(model, field="x", alpha=1.0)
    outputs = mixing(rows, train=True, key=KEY)
    share, partner = float(outputs["mixup"]["share"]), np.asarray(outputs["mixup"]["partner"])
    assert 0 < share < 1 and sorted(partner) == list(range(12)) and (partner != np.arange(12)).any()
    x = np.asarray(rows["x"])
    by_hand = rows | {"x": jnp.asarray(share * x + (1 - share) * x[partner])}
    z = np.asarray(model(by_hand)["logits"])
    np.testing.assert_allclose(outputs["logits"], z, rtol=1e-4, atol=1e-6)
    soft = (
        share * np.eye(C)[np.asarray(rows["label"])]
        + (1 - share) * np.eye(C)[np.asarray(rows["label"])[partner]]
    )
    losses = -(soft * log_softmax(z)).sum(-1)
    w = np.asarray(rows["weight"]) * np.asarray(rows["weight"])[partner]
    value, _ = domain.Mixup()(mixing, rows, KEY)
    np.testing.assert_allclose(value, (w * losses).sum() / w.sum(), rtol=1e-4)
    # Evaluation does not mix.
    np.testing.assert_array_equal(mixing(rows)["logits"], model(rows)["logits"])


def test_mixup_refuses(model, rows):
    tokens = rows | {"x": jnp.ones((12, 5), jnp.int32)}
    with pytest.raises(ValueError, match="real numbers; field 'x' is int32"):
        domain.with_mixup(model, field="x")(tokens, train=True, key=KEY)
    with pytest.raises(ValueError, match="pass key="):
        domain.with_mixup(model, field="x")(rows, train=True)
    with pytest.raises(ValueError, match="alpha"):
        domain.with_mixup(model, alpha=0.0)
    with pytest.raises(KeyError, match="jtl.domain.with_mixup"):
        domain.Mixup()(model, rows, KEY)


def test_what_is_missing_is_named(model, rows):
    for name in ("domain", "label"):
        bare = {field: value for field, value in rows.items() if field != name}
        for loss in (domain.IRM(), domain.VREx()):
            with pytest.raises(KeyError, match=f"needs a column '{name}'"):
                loss(model, bare, KEY)
