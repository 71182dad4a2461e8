"""Methods that learn from the model's own predictions, or adapt its statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import domain, ema, finetune, heads, tree
from jtl.domain.tent import Tent
from jtl.model import linen
from jtl.train import make_step

C = 3
KEY = jax.random.key(0)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def targets(batch):
    return np.flatnonzero((np.asarray(batch["domain"]) == 1) & (np.asarray(batch["weight"]) > 0))


# --- pseudo-labels, FixMatch -----------------------------------------------------------------------


def pseudo_oracle(z, labeller, threshold):
    p, q = softmax(z), softmax(labeller)
    rows = [-np.log(p[i, q[i].argmax()]) if q[i].max() >= threshold else 0.0 for i in range(len(z))]
    return np.mean(rows), np.mean(q.max(-1) >= threshold)


def test_pseudo_labels_count_confident_rows_over_all_rows():
    rng = np.random.default_rng(0)
    z, q = 2 * rng.normal(size=(2, 20, C)).astype(np.float32)
    for threshold in (0.0, 0.7, 0.999999):
        loss, share = pseudo_oracle(z, q, threshold)
        found = domain.pseudo_label(jnp.asarray(z), jnp.asarray(q), threshold=threshold)
        np.testing.assert_allclose(found, (loss, share), rtol=1e-5, atol=1e-7)
    assert 0 < pseudo_oracle(z, q, 0.7)[1] < 1
    weight = (np.arange(20) % 2).astype(np.float32)
    found = domain.pseudo_label(jnp.asarray(z), jnp.asarray(q), jnp.asarray(weight), threshold=0.7)
    np.testing.assert_allclose(found, pseudo_oracle(z[1::2], q[1::2], 0.7), rtol=1e-5)
    gradient = jax.grad(lambda q: domain.pseudo_label(jnp.asarray(z), q, threshold=0.7)[0])(jnp.asarray(q))
    assert (gradient == 0).all()


def test_losses_take_target_rows_and_views(model, batch):
    z = np.asarray(model(batch)["logits"])
    t = targets(batch)
    loss, aux = domain.PseudoLabels(threshold=0.5)(model, batch, KEY)
    np.testing.assert_allclose(loss, pseudo_oracle(z[t], z[t], 0.5)[0], rtol=1e-5)
    assert 0 < float(aux.metrics["confident"]) <= 1
    views = batch | {"strong": batch["x"] * 0.5 + 1}
    strong = np.asarray(model(batch | {"x": views["strong"]})["logits"])
    found = domain.FixMatch(field="x", threshold=0.5)(model, views, KEY)[0]
    np.testing.assert_allclose(found, pseudo_oracle(strong[t], z[t], 0.5)[0], rtol=1e-5)
    with pytest.raises(KeyError, match="'strong'"):
        domain.FixMatch(field="x")(model, batch, KEY)
    with pytest.raises(KeyError, match="'image'.*weak view"):
        domain.FixMatch()(model, batch, KEY)


# --- SHOT ------------------------------------------------------------------------------------------


def test_information_maximisation():
    z = np.random.default_rng(0).normal(size=(9, C)).astype(np.float32)
    p = softmax(z)
    expected = -(p * np.log(p)).sum(-1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    np.testing.assert_allclose(domain.information_maximisation(jnp.asarray(z)), expected, rtol=1e-4)
    padded = jnp.concatenate([jnp.asarray(z), jnp.full((2, C), 5.0)])
    weight = jnp.asarray([1.0] * 9 + [0.0] * 2)
    np.testing.assert_allclose(domain.information_maximisation(padded, weight), expected, rtol=1e-4)
    # Sure and diverse is best, -log C; sure of one class for all, or unsure, is 0.
    np.testing.assert_allclose(domain.information_maximisation(99 * jnp.eye(C)), -np.log(C), rtol=1e-5)
    for z in (jnp.zeros((4, C)), 99 * jnp.eye(C)[jnp.zeros(4, int)]):
        value, gradient = jax.value_and_grad(domain.information_maximisation)(z)
        assert abs(float(value)) < 1e-5 and bool(jnp.isfinite(gradient).all())


def test_centroid_labels_mend_predictions_by_clusters():
    rng = np.random.default_rng(0)
    truth = np.arange(30) % C
    features = 5 * np.eye(C)[truth] + 0.3 * rng.normal(size=(30, C))
    wrong = truth.copy()
    wrong[:6] = (wrong[:6] + 1) % C
    logits = 2 * np.eye(C)[wrong]
    found = domain.centroid_labels(features, logits)
    np.testing.assert_array_equal(found, truth)
    # Cosine distance: lengths do not matter.
    np.testing.assert_array_equal(
        domain.centroid_labels(features * rng.uniform(0.1, 9, (30, 1)), logits), truth
    )
    with pytest.raises(ValueError, match="found 30, 29"):
        domain.centroid_labels(features, logits[:-1])


def centroid_oracle(f, z):
    p = softmax(z)
    centroids = np.stack([(p[:, k, None] * f).sum(0) / p[:, k].sum() for k in range(p.shape[1])])
    for _ in range(2):
        cosine = [[x @ c / np.linalg.norm(x) / np.linalg.norm(c) for c in centroids] for x in f]
        label = np.argmax(cosine, -1)
        centroids = np.stack(
            [f[label == k].mean(0) if (label == k).any() else centroids[k] for k in range(p.shape[1])]
        )
    return label


def test_centroid_labels_against_loops():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        f, z = rng.normal(size=(15, 4)) + 0.5, 2 * rng.normal(size=(15, C))
        np.testing.assert_array_equal(domain.centroid_labels(f, z), centroid_oracle(f, z))


def test_shot_needs_no_source(model, batch):
    rows = {name: batch[name] for name in ("x", "weight")}
    label = jnp.arange(12) % C
    z = np.asarray(model(rows)["logits"])
    w = np.asarray(batch["weight"]) > 0
    plain = float(domain.information_maximisation(jnp.asarray(z[w])))
    ce = -np.log(softmax(z)[np.arange(12), np.asarray(label)])[w].mean()
    found = domain.SHOT(beta=0.3)(model, rows | {"pseudo_label": label}, KEY)[0]
    np.testing.assert_allclose(found, plain + 0.3 * ce, rtol=1e-4)
    np.testing.assert_allclose(domain.SHOT(beta=0.0)(model, rows, KEY)[0], plain, rtol=1e-4)
    with pytest.raises(KeyError, match="'pseudo_label': from jtl.domain.centroid_labels"):
        domain.SHOT()(model, rows, KEY)


# --- mean teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_the_average_of_all_updates(model, batch):
    decay = 0.6
    student = ema.with_teacher(model, decay=decay)
    step = make_step(domain.Source(jtl_classify()) + 2.0 * domain.MeanTeacher(), optax.sgd(0.5))
    state = step.init(student, KEY)
    average = jax.tree.map(np.asarray, model.params)
    t = targets(batch)
    for i in range(3):
        params = jax.tree.map(np.asarray, state.model.params)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        p = softmax(np.asarray(model.with_params(params)(batch)["logits"]))
        q = softmax(np.asarray(model.with_params(jax.tree.map(jnp.asarray, average))(batch)["logits"]))
        state, metrics = step(state, batch)
        expected = ((p - q)[t] ** 2).sum(-1).mean()
        np.testing.assert_allclose(metrics["MeanTeacher"], expected, rtol=1e-3, atol=1e-8)
        assert (expected > 1e-5) == (i > 0)
    found = ema.average_model(state.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found.params, average)
    assert "teacher" not in found.variables and "teacher_logits" not in found(batch, train=True, key=KEY)


def jtl_classify():
    from jtl.tasks import Classify

    return Classify()


def test_no_gradient_flows_into_the_teacher(model, batch):
    student = ema.with_teacher(model, decay=0.0)  # the teacher is the student: all agree, nothing pulls
    gradient = jax.grad(lambda m: domain.MeanTeacher()(m, batch, KEY)[0])(student)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="decay"):
        ema.with_teacher(model, decay=1.0)
    with pytest.raises(ValueError, match="no moving average"):
        ema.average_model(model)
    with pytest.raises(KeyError, match="teacher_logits"):
        domain.MeanTeacher()(model, batch, KEY)


# --- statistics ------------------------------------------------------------------------------------


class Normed(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train: bool = False, use_running_average: bool = True):
        x = nn.Dense(5, name="first")(x)
        x = nn.BatchNorm(use_running_average=use_running_average, momentum=self.momentum, name="norm")(x)
        return {"features": nn.LayerNorm(name="layer_norm")(nn.relu(x))}


@pytest.fixture(scope="module")
def normed():
    x = jnp.ones((2, 4))
    return heads.classifier(linen(Normed(), Normed().init(KEY, x)), C, key=KEY, on="features", width=5)


@pytest.fixture(scope="module")
def shifted():
    return np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32) * 3 + 5


@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_adabn_is_the_mean_and_variance_of_the_target(normed, shifted, momentum):
    model = normed.replace(base=linen(Normed(momentum), normed.variables).base)
    junk = np.concatenate([shifted[16:], np.full((4, 4), 99, np.float32)])
    batches = [
        {"x": shifted[:8]},
        {"x": shifted[8:16], "weight": np.ones(8, np.float32)},
        {"x": junk, "weight": np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32)},
    ]
    found = domain.adabn(model, batches)
    h = shifted @ np.asarray(model.params["first"]["kernel"]) + np.asarray(model.params["first"]["bias"])
    stats = found.variables["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], h.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], h.var(0), rtol=1e-3)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    assert tree.diff(found.params, model.params) == []


def test_adabn_refuses(model, normed):
    with pytest.raises(ValueError, match="no running statistics"):
        domain.adabn(model, [])
    with pytest.raises(ValueError, match="no row"):
        domain.adabn(normed, [{"x": np.ones((2, 4), np.float32), "weight": np.zeros(2, np.float32)}])


def test_tent_trains_scales_and_shifts_alone(model, normed, shifted, batch):
    rows = {"x": jnp.asarray(shifted)}
    labels = domain.norm_only(normed, rows)
    trained = {path for path, rate in tree.flatten(labels).items() if rate}
    assert trained == {"norm/scale", "norm/bias", "layer_norm/scale", "layer_norm/bias"}
    step = make_step(Tent(), optax.adam(0.05), labels)
    state = step.init(normed, KEY)
    p = softmax(np.asarray(normed(rows, stats="batch")["logits"]))
    seen = []
    for _ in range(5):
        state, metrics = step(state, rows)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen[0], -(p * np.log(p)).sum(-1).mean(), rtol=1e-4)
    assert seen[-1] < seen[0]
    for path, leaf in tree.flatten(state.model.params).items():
        assert bool((leaf == tree.flatten(normed.params)[path]).all()) == (path not in trained), path
    with pytest.raises(ValueError, match="no normalisation layer"):
        domain.norm_only(model, batch)


def test_tent_goes_on_or_starts_anew(normed, shifted):
    batches = [{"x": jnp.asarray(shifted[:10])}, {"x": jnp.asarray(shifted[10:])}]
    step = make_step(Tent(), optax.sgd(0.5), domain.norm_only(normed, batches[0]))
    plain = [np.asarray(normed(b, stats="batch")["logits"]) for b in batches]
    online = domain.adapt(step, normed, batches, key=KEY)
    np.testing.assert_allclose(online[:10], plain[0], atol=1e-5)
    assert np.abs(online[10:] - plain[1]).max() > 1e-3
    # Episodic results do not depend on what came before.
    episodic = domain.adapt(step, normed, batches, key=KEY, episodic=True, updates=2)
    turned = domain.adapt(step, normed, batches[::-1], key=KEY, episodic=True, updates=2)
    np.testing.assert_allclose(episodic, np.concatenate([turned[10:], turned[:10]]), atol=1e-5)
    assert np.abs(episodic[:10] - plain[0]).max() > 1e-3
    padded = [batches[0] | {"weight": jnp.arange(10.0) < 4}]
    assert len(domain.adapt(step, normed, padded, key=KEY)) == 4
    with pytest.raises(ValueError, match="no batches"):
        domain.adapt(step, normed, [], key=KEY)


def test_labels_of_shot_freeze_the_hypothesis(model):
    labels = tree.flatten(finetune.freeze(model, "head/.*"))
    assert labels["body/kernel"] == 1.0 and labels["head/out/kernel"] == 0.0
