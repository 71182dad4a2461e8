"""Every metric learner against NumPy, task by task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, heads, meta
from jtl.meta.ridge import ridge
from jtl.train import make_step
from jtl.wrap import function

T, WAYS, D = 3, 3, 5
LABEL = np.array([2, 0, 1, 1, 0, 2])  # of the support; the query's are 0 ... 2 and 1
ASKED = np.array([0, 1, 2, 1])


@pytest.fixture(scope="module")
def model():
    params = {"body": {"kernel": jax.random.normal(jax.random.key(3), (4, D)) / 2}}
    return function(lambda params, x: x @ params["body"]["kernel"], params)


@pytest.fixture(scope="module")
def episodes():
    rng = np.random.default_rng(0)

    def part(label):
        rows = rng.normal(size=(T, len(label), 4)).astype(np.float32)
        return {"x": jnp.asarray(rows), "label": jnp.tile(jnp.asarray(label)[None], (T, 1))}

    return {"support": part(LABEL), "query": part(ASKED)}


def features(model, episodes):
    kernel = np.asarray(model.params["body"]["kernel"], np.float64)
    return [np.asarray(episodes[part]["x"]) @ kernel for part in ("support", "query")]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def check(loss, model, episodes, probabilities):
    """Losses, accuracies and their means, given what NumPy says of each task."""
    losses = [-np.mean(np.log(p[np.arange(len(ASKED)), ASKED])) for p in probabilities]
    hits = [np.mean(p.argmax(-1) == ASKED) for p in probabilities]
    found, metrics, _ = jax.jit(loss.tasks)(model, episodes)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], hits)
    value, aux = loss(model, episodes, None)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["accuracy"], np.mean(hits), rtol=1e-6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypes(model, episodes, distance):
    expected = []
    for s, q in zip(*features(model, episodes), strict=True):
        centres = np.stack([s[LABEL == k].mean(0) for k in range(WAYS)])
        if distance == "cosine":
            expected.append(softmax(unit(q) @ unit(centres).T))
        else:
            expected.append(softmax(-((q[:, None] - centres[None]) ** 2).sum(-1)))
    check(meta.Prototypes(ways=WAYS, normalise="running", distance=distance), model, episodes, expected)


def test_matching(model, episodes):
    expected = []
    for s, q in zip(*features(model, episodes), strict=True):
        attention = softmax(unit(q) @ unit(s).T)
        expected.append(np.stack([attention[:, LABEL == k].sum(-1) for k in range(WAYS)], -1))
    check(meta.Matching(ways=WAYS, normalise="running"), model, episodes, expected)


def test_ridge(model, episodes):
    strong = meta.with_ridge(model, regularisation=0.7, scale=3.0)
    expected = []
    for s, q in zip(*features(model, episodes), strict=True):
        weights = np.linalg.inv(s.T @ s + 0.7 * np.eye(D)) @ s.T @ np.eye(WAYS)[LABEL]  # the other form
        expected.append(softmax(3.0 * q @ weights))
    loss = meta.Ridge(ways=WAYS, normalise="running")
    check(loss, strong, episodes, expected)
    slope = jax.grad(lambda m: loss(m, episodes, None)[0])(strong).params["ridge"]
    assert float(slope["log_regularisation"]) != 0 and float(slope["log_scale"]) != 0
    with pytest.raises(KeyError, match="with_ridge"):
        loss(model, episodes, None)
    with pytest.raises(ValueError, match="over 0"):
        meta.with_ridge(model, scale=0.0)


def test_ridge_without_a_penalty_interpolates():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    y = jnp.eye(3)
    np.testing.assert_allclose(x @ ridge(x, y, jnp.float32(1e-6)), y, atol=1e-4)


def test_relation(model, episodes):
    with_leaves = meta.with_relation(model, meta.Relation(hidden=4), width=D, key=jax.random.key(1))
    loss = meta.RelationNet(ways=WAYS, normalise="running", module=meta.Relation(hidden=4))
    own = jax.tree.map(np.asarray, with_leaves.params["relation"])
    losses, hits = [], []
    for s, q in zip(*features(model, episodes), strict=True):
        sums = np.stack([s[LABEL == k].sum(0) for k in range(WAYS)])
        scores = np.empty((len(q), WAYS))
        for i, row in enumerate(q):
            for k, one in enumerate(sums):
                hidden = np.maximum(
                    np.concatenate([one, row]) @ own["dense"]["kernel"] + own["dense"]["bias"], 0
                )
                scores[i, k] = (hidden @ own["out"]["kernel"] + own["out"]["bias"])[0]
        losses.append(np.mean((1 / (1 + np.exp(-scores)) - np.eye(WAYS)[ASKED]) ** 2))
        hits.append(np.mean(scores.argmax(-1) == ASKED))
    found, metrics, _ = loss.tasks(with_leaves, episodes)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], hits)
    with pytest.raises(KeyError, match="with_relation"):
        loss(model, episodes, None)


HEADS = {
    "prototypes": (meta.Prototypes(ways=4, normalise="running"), lambda model: model),
    "matching": (meta.Matching(ways=4, normalise="running"), lambda model: model),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_support_is_never_named_and_costs_infinity(model, episodes, name):
    loss, _ = HEADS[name]
    assert np.isfinite(loss.tasks(model, episodes)[0]).all()
    fewer = {**loss.__dict__, "ways": 3}
    np.testing.assert_allclose(
        loss.tasks(model, episodes)[0], type(loss)(**fewer).tasks(model, episodes)[0], rtol=1e-5
    )
    asked = episodes["query"]["label"].at[0, 0].set(3)
    wrong = {**episodes, "query": {**episodes["query"], "label": asked}}
    assert np.isinf(loss.tasks(model, wrong)[0][0]) and np.isfinite(loss.tasks(model, wrong)[0][1:]).all()
    outside = {**episodes, "query": {**episodes["query"], "label": asked + 4}}
    assert np.isnan(loss.tasks(model, outside)[0]).all()


def test_a_metric_learner_trains_and_adds_to_other_losses(model, episodes):
    anchored = meta.Prototypes(ways=WAYS, normalise="running") + finetune.L2SP(model.params, 0.01, 0.0)
    step = make_step(anchored, optax.adam(0.03))
    state = step.init(model, jax.random.key(0))
    history = []
    for _ in range(30):
        state, metrics = step(state, episodes)
        history.append(float(metrics["Prototypes"]))
    assert history[-1] < 0.7 * history[0]
    assert step._compiled._cache_size() == 1


def test_errors_of_metric_learners(model, episodes):
    with pytest.raises(KeyError, match=r"reads output 'map'; the model gives \['features'\]"):
        meta.Prototypes(ways=WAYS, normalise="running", on="map")(model, episodes, None)
    with pytest.raises(ValueError, match="'support' and 'query'"):
        meta.Prototypes(ways=WAYS, normalise="running")(model, episodes["support"], None)


def test_a_cosine_head_adapts_alone(model, episodes):
    """Baseline++: the features stay, and the head's logits are cosines."""
    whole = heads.attach(model, meta.Cosine(WAYS, scale=4.0), on="features", width=D, key=jax.random.key(5))
    rows = episodes["query"]["x"][0]
    found = whole({"x": rows})["logits"]
    kernel = np.asarray(whole.params["head"]["kernel"])
    x = np.asarray(rows) @ np.asarray(model.params["body"]["kernel"])
    np.testing.assert_allclose(found, 4.0 * unit(x) @ unit(kernel.T).T, rtol=1e-4, atol=1e-5)
    assert np.isfinite(whole({"x": jnp.zeros((1, 4))})["logits"]).all()
