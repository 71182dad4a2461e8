"""The inner loop's arguments, its learned rules, its errors and its reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, meta, tree
from jtl.loss import Aux
from jtl.meta.rules import updates_of
from jtl.train import fit, make_step
from jtl.wrap import function

KEY = jax.random.key(0)
START = {"body": {"kernel": jnp.array([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]])}, "head": jnp.array([2.0, -1.0])}


def pull(params, batch, key):
    """Half the squared distance to the batch's mean row, for each leaf."""
    aims = jnp.mean(batch["x"])
    return 0.5 * sum(jnp.sum((leaf - aims) ** 2) for leaf in jax.tree.leaves(params)), Aux({}, {})


SUPPORT = {"x": jnp.array([0.0, 1.0, 2.0, 5.0])}


def test_what_is_labelled_0_stays_bit_equal():
    labels = {"body": {"kernel": 0.0}, "head": 1.0}
    found = meta.adapt(pull, START, SUPPORT, KEY, steps=2, rate=0.5, labels=labels)
    np.testing.assert_array_equal(found["body"]["kernel"], START["body"]["kernel"])
    np.testing.assert_allclose(found["head"], 2.0 + (START["head"] - 2.0) / 4)


def test_observed_after_each_step():
    found = meta.trajectory(
        pull, START, SUPPORT, KEY, steps=3, rate=0.5, observe=lambda params: params["head"][0]
    )
    np.testing.assert_allclose(found.observed, [2.0, 2.0, 2.0])
    found = meta.trajectory(
        pull, START, SUPPORT, KEY, steps=3, rate=0.5, observe=lambda params: params["head"][1]
    )
    np.testing.assert_allclose(found.observed, [0.5, 1.25, 1.625])
    assert float(found.params["head"][1]) == 1.625


def test_minibatches_go_through_all_rows_before_one_comes_again():
    def see(params, batch, key):
        return jnp.sum(params["seen"] * jax.nn.one_hot(batch["row"], 6).sum(0)), Aux({}, {})

    rows = {"row": jnp.arange(6)}
    count = lambda steps, size, key: np.asarray(  # noqa: E731
        -meta.adapt(see, {"seen": jnp.zeros(6)}, rows, key, steps=steps, rate=1.0, minibatch=size)["seen"]
    )
    np.testing.assert_array_equal(count(3, 2, KEY), np.ones(6))
    np.testing.assert_array_equal(count(3, 4, KEY), np.full(6, 2.0))
    partial = count(1, 4, KEY)
    assert sorted(partial) == [0, 0, 1, 1, 1, 1]
    assert any((count(1, 4, jax.random.key(i)) != partial).any() for i in range(1, 4))
    with pytest.raises(ValueError, match="minibatch must be 1 to 6"):
        count(1, 7, KEY)


def test_an_optax_transformation_is_the_inner_optimiser():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9))
    found = meta.adapt(pull, START, SUPPORT, KEY, steps=3, rate=optimizer)
    params, state = START, optimizer.init(START)
    for _ in range(3):
        updates, state = optimizer.update(tree.map_with_path(lambda _, p: p - 2.0, params), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, params)


def test_first_order_takes_no_second_derivative():
    """The slope of |w|³ has the derivative 6|w|: through a step 1 − 6α|w|, around it 1."""
    cube = lambda params, batch, key: (jnp.sum(jnp.abs(params["w"]) ** 3), Aux({}, {}))  # noqa: E731

    def after(w, first_order):
        return meta.adapt(cube, {"w": w}, SUPPORT, KEY, steps=1, rate=0.1, first_order=first_order)["w"]

    assert float(jax.grad(after)(jnp.array(0.5), True)) == 1.0
    np.testing.assert_allclose(jax.grad(after)(jnp.array(0.5), False), 1 - 0.6 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"labels": {"body": {"kernel": 0.0}, "head": 0.0}}, "nothing adapts"),
        ({"labels": {"head": 1.0}}, r"labels lack \['body/kernel'\]"),
        ({"labels": {"body": {"kernel": 1.0, "bias": 1.0}, "head": 1.0}}, r"adapt \['body/bias'\].*freeze"),
        ({"rate": meta.MetaSGD(0.1)}, "MetaSGD has no leaves.*inner/body/kernel.*1 more.*learn"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        meta.adapt(pull, START, SUPPORT, KEY, **{"steps": 1, "rate": 0.1, **options})


# --- learned rules -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return function(lambda params, x: x, START)


def adapted_square(rule, steps=1):
    """Half the squared norm of the adapted parameters, as a function of all of them."""

    def value(params):
        found = meta.adapt(own, params, SUPPORT, KEY, steps=steps, rate=rule)
        return own(found, SUPPORT, None)[0]

    def own(params, batch, key):
        return pull({name: params[name] for name in ("body", "head")}, batch, key)

    return jax.jit(jax.grad(value))


def test_meta_sgd_learns_a_rate_for_each_entry(model):
    rule = meta.MetaSGD(0.1)
    params = meta.learn(model, rule).params
    assert tree.flatten(params["inner"]).keys() == {"body/kernel/rate", "head/rate"}
    found = adapted_square(rule)(params)
    # φ = θ − α g with g = θ − 2, so the loss ½(φ − 2)² = ½(1 − α)² g² has the slope −(1 − α) g² in α.
    for leaf, slope in ((START["head"], found["inner"]["head"]["rate"]),):
        np.testing.assert_allclose(slope, -0.9 * (leaf - 2.0) ** 2, rtol=1e-5)
    np.testing.assert_allclose(found["head"], 0.81 * (START["head"] - 2.0), rtol=1e-5)
    assert found["inner"]["body"]["kernel"]["rate"].shape == (2, 3)


def test_a_rate_for_each_step(model):
    rule = meta.PerStep(0.1, steps=2)
    params = meta.learn(model, rule).params
    params["inner"]["head"]["rates"] = jnp.array([0.2, 0.5])
    found = adapted_square(rule, steps=2)(params)["inner"]["head"]["rates"]
    squares = float(jnp.sum((START["head"] - 2.0) ** 2))
    # ½ (1 − a)² (1 − b)² g²
    np.testing.assert_allclose(found, [-0.8 * 0.25 * squares, -0.64 * 0.5 * squares], rtol=1e-5)
    longer = meta.adapt(
        lambda params, batch, key: pull({"head": params["head"]}, batch, key),
        params, SUPPORT, KEY, steps=3, rate=rule,
    )  # fmt: skip
    np.testing.assert_allclose(longer["head"] - 2.0, (START["head"] - 2.0) * 0.8 * 0.5 * 0.5, rtol=1e-5)


def test_meta_curvature_starts_as_gradient_descent_and_multiplies_each_axis():
    rule, rng = meta.MetaCurvature(0.1), np.random.default_rng(0)
    leaves = {"dense": (3, 4), "conv": (2, 2, 3, 4), "bias": (4,), "scale": ()}
    gradients = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in leaves.items()}
    own = {name: rule.start(leaf) for name, leaf in gradients.items()}
    assert {name: sorted(found) for name, found in own.items()} == {
        "dense": ["m_in", "m_out"], "conv": ["m_at", "m_in", "m_out"], "bias": ["m_out"], "scale": [],
    }  # fmt: skip
    plain = updates_of(rule, own, gradients, jnp.int32(0))
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-6), plain, gradients)

    own = jax.tree.map(lambda m: jnp.asarray(rng.normal(size=m.shape), jnp.float32), own)
    found = updates_of(rule, own, gradients, jnp.int32(0))
    g, m = (jax.tree.map(np.asarray, values) for values in (gradients, own))
    dense = m["dense"]["m_in"] @ g["dense"] @ m["dense"]["m_out"].T
    np.testing.assert_allclose(found["dense"], -0.1 * dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["bias"], -0.1 * m["bias"]["m_out"] @ g["bias"], rtol=1e-4, atol=1e-5)
    conv = np.zeros((4, 3, 4))
    for p in range(4):
        for q in range(4):
            part = m["conv"]["m_in"] @ g["conv"].reshape(4, 3, 4)[q] @ m["conv"]["m_out"].T
            conv[p] += m["conv"]["m_at"][p, q] * part
    np.testing.assert_allclose(found["conv"].reshape(4, 3, 4), -0.1 * conv, rtol=1e-4, atol=1e-5)


def test_a_rule_that_nothing_reads_raises(model):
    params = meta.learn(model, meta.MetaSGD(0.1)).params
    with pytest.raises(ValueError, match="has a rule's leaves under 'inner'"):
        meta.adapt(pull, params, SUPPORT, KEY, steps=1, rate=0.1)
    with pytest.raises(ValueError, match="PerStep has no leaves of its shapes at inner/body/kernel"):
        meta.adapt(pull, params, SUPPORT, KEY, steps=1, rate=meta.PerStep(0.1, 1))


def test_learning_again_replaces_and_where_chooses(model):
    again = meta.learn(meta.learn(model, meta.PerStep(0.1, 3)), meta.MetaSGD(0.1), where="head").params
    assert list(tree.flatten(again["inner"])) == ["head/rate"]
    labels = finetune.train_only(model, "head")
    adapted = meta.adapt(
        lambda params, batch, key: pull({"head": params["head"]}, batch, key),
        again, SUPPORT, KEY, steps=1, rate=meta.MetaSGD(0.1), labels=labels,
    )  # fmt: skip
    np.testing.assert_allclose(adapted["head"] - 2.0, 0.9 * (START["head"] - 2.0), rtol=1e-6)
    with pytest.raises(tree.RuleError):
        meta.learn(model, meta.MetaSGD(0.1), where="encoder/.*")


# --- curves, and rates that are too large --------------------------------------------------------------


def line(params, x):
    return {"prediction": x * params["w"]}


def squared(model, batch, key):
    error = model(batch)["prediction"] - batch["y"]
    return jnp.mean(error**2), Aux({"bias": jnp.mean(error)}, {})


EPISODES = {
    part: {"x": jnp.array([[1.0, 2.0], [1.0, 3.0]]), "y": jnp.array([[2.0, 4.0], [-1.0, -3.0]])}
    for part in ("support", "query")
}


@pytest.mark.parametrize("chunk", [None, 1])
def test_curves_of_every_task(chunk):
    model = function(line, {"w": jnp.array(0.0)})
    evaluate = meta.make_evaluate(squared, steps=2, rate=0.05, chunk=chunk)
    curves = evaluate(model, EPISODES, KEY)
    # w ← w − 2 α mean(x²) (w − w*): the distance shrinks by 1 − 0.1 · mean(x²).
    squares = np.array([2.5, 5.0])
    away = np.array([-2.0, 1.0])[:, None] * (1 - 0.1 * squares[:, None]) ** np.arange(3)[None]
    np.testing.assert_allclose(curves["loss"], squares[:, None] * away**2, rtol=1e-5)
    np.testing.assert_allclose(curves["bias"], np.array([1.5, 2.0])[:, None] * away, rtol=1e-5)


def test_a_rate_that_diverges_is_reported():
    model = function(line, {"w": jnp.array(0.0)})
    with pytest.raises(meta.Diverged, match="of 2 of 2 tasks is not finite.*inner step 1.*1e[+]30"):
        meta.make_evaluate(squared, steps=2, rate=1e30)(model, EPISODES, KEY)
    step = make_step(squared, optax.sgd(0.1), gradient=meta.maml(steps=1, rate=1e30))
    _, metrics = step(step.init(model, KEY), EPISODES)
    assert float(metrics["diverged"]) == 1
    one = jax.tree.map(lambda x: x.at[1].set(0.0), EPISODES)
    _, metrics = step(step.init(model, KEY), one)
    assert float(metrics["diverged"]) == 0.5
    with pytest.raises(FloatingPointError, match="the loss of step 1"):
        fit(step, step.init(model, KEY), [EPISODES], steps=1, progress=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": jnp.ones((2, 3))}, r"'support' and 'query'.*found \['x'\]"),
        ({"support": {"x": jnp.ones((2, 3))}, "query": {"x": jnp.ones((3, 3))}}, "share their first axis"),
    ],
)
def test_a_batch_that_is_none_of_tasks(batch, message):
    with pytest.raises(ValueError, match=message):
        meta.maml(steps=1, rate=0.1)(pull, START, batch, KEY)


def test_chunks_divide_the_tasks():
    with pytest.raises(ValueError, match="chunk=3 does not divide the 2 tasks"):
        meta.maml(steps=1, rate=0.1, chunk=3)(pull, START, EPISODES, KEY)
