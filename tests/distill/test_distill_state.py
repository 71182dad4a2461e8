"""What changes beside the parameters: CRD's memories, moving averages; and students that teach each other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import distill, ema
from jtl.data.batches.mixup import mixup
from jtl.distill.crd import others
from jtl.model import Mode, remove
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

B, D, C, EXAMPLES = 5, 4, 3, 20


def apply(params, x):
    hidden = jnp.tanh(x @ params["body"])
    return {"features": hidden, "logits": hidden @ params["out"]}


def net(width, seed):
    keys = jax.random.split(jax.random.key(seed))
    return function(
        apply, {"body": jax.random.normal(keys[0], (D, width)), "out": jax.random.normal(keys[1], (width, C))}
    )


@pytest.fixture(scope="module")
def batch():
    return {
        "x": jax.random.normal(jax.random.key(0), (B, D)),
        "label": jnp.arange(B) % C,
        "index": jnp.array([3, 19, 0, 7, -1]),
        "weight": jnp.array([1.0, 1, 1, 1, 0]),
    }


@pytest.fixture(scope="module")
def teacher():
    return net(7, 1)


@pytest.fixture(scope="module")
def student(teacher, batch):
    return distill.memory(net(6, 2), teacher, examples=EXAMPLES, batch=batch, key=jax.random.key(3), width=8)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_crd_reads_the_memories_and_moves_them(student, teacher, batch):
    key, n = jax.random.key(5), 6
    loss = distill.Distill(teacher, distill.CRD(negatives=n, temperature=0.3))
    value, aux = jax.jit(loss.__call__)(student, batch, key)
    embedded = {
        side: unit(np.asarray(model(batch)["features"] @ leaves["kernel"] + leaves["bias"][None]))
        for side, model, leaves in (
            ("student", net(6, 2), student.params["crd"]["student"]),
            ("teacher", teacher, student.params["crd"]["teacher"]),
        )
    }
    index = others(batch["index"], EXAMPLES, n, key)
    banks = {side: np.asarray(bank) for side, bank in student.variables["crd"].items()}
    positive = (embedded["student"] * embedded["teacher"]).sum(-1)
    expected = sum(
        distill.crd(
            jnp.asarray(positive),
            jnp.einsum("bd,bnd->bn", embedded[side], banks[other][index]),
            EXAMPLES, 0.3, batch["weight"],
        )
        for side, other in (("student", "teacher"), ("teacher", "student"))
    )  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for side, bank in aux.state["crd"].items():
        moved = banks[side].copy()
        for row, place in enumerate([3, 19, 0, 7]):
            moved[place] = unit(0.5 * banks[side][place] + 0.5 * embedded[side][row])
        np.testing.assert_allclose(bank, moved, atol=1e-5)


def test_negatives_are_all_examples_but_the_own():
    drawn = np.asarray(others(jnp.array([0, 4, 2]), 5, 400, jax.random.key(0)))
    for row, own in zip(drawn, (0, 4, 2), strict=True):
        assert set(row) == set(range(5)) - {own}
        assert (np.bincount(row, minlength=5)[[i for i in range(5) if i != own]] > 60).all()


def test_a_step_of_crd(student, teacher, batch):
    step = make_step(distill.Distill(teacher, Classify() + 0.1 * distill.CRD(negatives=6)), optax.sgd(0.1))
    state = step.init(student, jax.random.key(0))
    state, metrics = step(state, batch)
    changed = np.any(state.collections["crd"]["teacher"] != student.variables["crd"]["teacher"], -1)
    assert np.flatnonzero(changed).tolist() == [0, 3, 7, 19]
    assert np.isfinite(metrics["loss"])
    kernels = [model.params["crd"]["teacher"]["kernel"] for model in (state.model, student)]
    assert np.any(kernels[0] != kernels[1])
    bare = remove(state.model, "crd")
    assert set(bare.variables) == {"params"} and set(bare.params) == {"body", "out"} and not bare.techniques
    np.testing.assert_array_equal(bare(batch)["logits"], state.model(batch)["logits"])
    # The teacher's features from a cache do as well.
    cached = {**batch, **distill.columns({"features": teacher(batch)["features"]})}
    first, second = (
        loss(student, given, jax.random.key(1))[0]
        for loss, given in (
            (distill.CRD(negatives=6), cached),
            (distill.Distill(teacher, distill.CRD(negatives=6)), batch),
        )
    )
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_crd_says_what_it_needs(student, teacher, batch):
    key = jax.random.key(0)
    with pytest.raises(KeyError, match="put Distill outermost"):
        (Classify() + distill.Distill(teacher, distill.CRD()))(student, batch, key)
    with pytest.raises(KeyError, match=r"\['index'\]"):
        bare = {name: value for name, value in batch.items() if name != "index"}
        distill.Distill(teacher, distill.CRD())(student, bare, key)
    with pytest.raises(ValueError, match="pass a key"):
        distill.Distill(teacher, distill.CRD())(student, batch, None)


def test_a_moving_average_teaches(batch):
    model = ema.with_average(net(6, 2), decay=0.75)
    loss = distill.EMATeacher(Classify() + distill.SoftTargets(2.0))
    step = make_step(loss, optax.sgd(0.5))
    state = step.init(model, jax.random.key(0))
    average, seen = model.params, []
    for _ in range(3):
        now = jax.tree.map(np.asarray, state.model.params)
        teacher = net(6, 2).with_params(average)(batch)["logits"]
        own = net(6, 2).with_params(now)(batch)["logits"]
        seen.append(float(distill.soft_targets(own, teacher, 2.0, batch["weight"])))
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, now)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["SoftTargets"], seen[-1], rtol=1e-4, atol=1e-7)
    assert seen[0] == 0 < seen[1]
    chex.assert_trees_all_close(ema.average_model(state.model).params, average, rtol=1e-5)
    assert not ema.average_model(state.model).techniques
    # Evaluation moves nothing.
    assert state.model.run(batch, Mode())[1] == {}
    with pytest.raises(ValueError, match="no moving average"):
        loss(net(6, 2), batch, None)
    with pytest.raises(ValueError, match="decay must be"):
        ema.with_average(net(6, 2), decay=1.0)


def test_no_gradient_through_the_average(batch):
    model = ema.with_average(net(6, 2)).with_params(net(6, 8).params)

    def loss(average):
        whole = model.replace(variables={**model.variables, "ema": average})
        return distill.EMATeacher(distill.SoftTargets())(whole, batch, None)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.variables["ema"])
    assert value > 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_peers_learn_from_each_other(batch):
    models = [net(width, seed) for width, seed in ((6, 2), (4, 3), (5, 4))]
    both = distill.peers(models)
    loss = jax.value_and_grad(lambda p: distill.Mutual()(both.with_params(p), batch, None), has_aux=True)
    (value, aux), gradient = jax.jit(loss)(both.params)
    logits = [model(batch)["logits"] for model in models]

    def own(params, k):
        mine = models[k].with_params(params)
        now, weight = mine(batch)["logits"], batch["weight"]
        taught = [distill.soft_targets(now, logits[i], 1.0, weight) for i in range(3) if i != k]
        return Classify()(mine, batch, None)[0] + sum(taught) / 2

    parts = [
        jax.jit(jax.value_and_grad(own), static_argnums=1)(model.params, k) for k, model in enumerate(models)
    ]
    np.testing.assert_allclose(value, sum(part for part, _ in parts), rtol=1e-5)
    for k, (_, expected) in enumerate(parts):
        chex.assert_trees_all_close(gradient[f"peer_{k}"], expected, atol=1e-5)
        np.testing.assert_array_equal(distill.peer(both, k)(batch)["logits"], logits[k])
    assert {"accuracy_0", "accuracy_1", "accuracy_2"} <= set(aux.metrics)
    with pytest.raises(ValueError, match="no peer 3"):
        distill.peer(both, 3)
    with pytest.raises(ValueError, match="at least two"):
        distill.peers(models[:1])
    with pytest.raises(ValueError, match="trains a model of"):
        distill.Mutual()(models[0], batch, None)


def test_mixup_mixes_one_batch_for_both():
    image = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
    batch = {
        "image": image,
        "label": jnp.arange(6),
        "index": jnp.arange(6),
        "teacher_logits": jnp.ones((6, 2)),
    }
    mixed = mixup(batch, jax.random.key(1))
    assert set(mixed) == {"image", "index"}
    found = np.asarray(mixed["image"])
    _, second = jax.random.split(jax.random.key(1))
    partner = image[np.asarray(jax.random.permutation(second, 6))]
    # One share for all pixels of an image: what comes out lies on the line to the partner.
    way = image - partner
    share = ((found - partner) * way).sum((1, 2, 3)) / np.maximum((way**2).sum((1, 2, 3)), 1e-9)
    np.testing.assert_allclose(found, share[:, None, None, None] * way + partner, atol=1e-5)
    assert len(set(share.round(3).tolist())) > 3 and (share >= 0).all() and (share <= 1).all()
    with pytest.raises(KeyError, match=r"mixes batch\['pixels'\]"):
        mixup(batch, jax.random.key(0), field="pixels")
