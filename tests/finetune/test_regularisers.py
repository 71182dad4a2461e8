import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, tree
from jtl.finetune import EWC, L2SP, consolidate, fisher
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

N, D, C = 37, 5, 3


def apply(params, x):
    return {"logits": x @ params["out"]["kernel"] + params["out"]["bias"][None]}


@pytest.fixture(scope="module")
def softmax():
    """A softmax regression, its data, and its probabilities in NumPy."""
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(N, D)).astype(np.float32), rng.integers(0, C, N)
    kernel, bias = rng.normal(size=(D, C)).astype(np.float32), rng.normal(size=C).astype(np.float32)
    model = function(apply, {"out": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}})
    logits = x @ kernel + bias
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return model, {"x": x, "label": label}, p


def pieces(batch, size):
    """Batches of ``size`` rows, the last filled with rows of weight 0 whose content would spoil the result."""
    for start in range(0, N, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        real = len(part["label"])
        fill = size - real
        yield {
            "x": np.concatenate([part["x"], np.full((fill, D), 100.0, np.float32)]),
            "label": np.concatenate([part["label"], np.zeros(fill, int)]),
            "weight": np.concatenate([np.ones(real, np.float32), np.zeros(fill, np.float32)]),
        }


def analytic(batch, p, mode):
    """d log p_y / d kernel[d, c] = x_d (1[y = c] - p_c), squared and averaged over examples (and over y ~ p)."""
    y = np.eye(C)[batch["label"]]
    error = p * (1 - p) if mode == "exact" else (y - p) ** 2
    return {"kernel": (batch["x"] ** 2).T @ error / N, "bias": error.mean(0)}


@pytest.mark.parametrize("mode", ["exact", "empirical"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_fisher_of_softmax_regression(softmax, mode, chunk):
    model, batch, p = softmax
    found = fisher(model, pieces(batch, 10), mode=mode, chunk=chunk)["out"]
    for name, expected in analytic(batch, p, mode).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_fisher_is_no_square_of_a_minibatch_mean(softmax):
    model, batch, p = softmax
    trap = jax.grad(lambda m: Classify()(m, batch, None)[0])(model).params["out"]
    found = fisher(model, [batch], mode="empirical")["out"]
    assert (np.asarray(found["kernel"]) > 3 * np.square(trap["kernel"])).all()
    # However the rows are cut into batches, the result is the same; that of the trap is not.
    whole, cut = (fisher(model, pieces(batch, size), mode="empirical")["out"]["kernel"] for size in (N, 5))
    np.testing.assert_allclose(whole, cut, rtol=1e-5)


def test_sampled_fisher_tends_to_the_exact_one(softmax):
    model, batch, p = softmax
    draws = 300
    many = {name: np.repeat(value, draws, 0) for name, value in batch.items()}
    found = fisher(model, [many], mode="sampled", chunk=256, key=jax.random.key(0))["out"]
    np.testing.assert_allclose(found["kernel"], analytic(batch, p, "exact")["kernel"], rtol=0.1)
    again = fisher(model, [batch], mode="sampled", key=jax.random.key(0))["out"]["kernel"]
    other = fisher(model, [batch], mode="sampled", key=jax.random.key(1))["out"]["kernel"]
    assert (again != other).any()


def test_fisher_of_some_leaves(softmax):
    model, batch, p = softmax
    found = fisher(model, [batch], where="out/bias")
    assert list(tree.flatten(found)) == ["out/bias"]
    np.testing.assert_allclose(found["out"]["bias"], analytic(batch, p, "exact")["bias"], rtol=1e-5)


def test_fisher_refuses(softmax):
    model, batch, _ = softmax
    with pytest.raises(ValueError, match="pass key="):
        fisher(model, [batch], mode="sampled")
    with pytest.raises(ValueError, match="mode must be"):
        fisher(model, [batch], mode="diagonal")
    with pytest.raises(ValueError, match=r"needs batch\['label'\]; the batch has \['x'\]"):
        fisher(model, [{"x": batch["x"]}], mode="empirical")
    with pytest.raises(ValueError, match="no row"):
        fisher(model, [])
    with pytest.raises(tree.RuleError):
        fisher(model, [batch], where="head/.*")


def test_ewc_is_the_weighted_distance(softmax):
    model, batch, _ = softmax
    weight = fisher(model, [batch])
    anchor = jax.tree.map(lambda leaf: leaf + 0.5, model.params)
    value, _ = EWC(anchor, weight, strength=3.0)(model, {}, None)
    total = sum(float(leaf.sum()) for leaf in jax.tree.leaves(weight))
    np.testing.assert_allclose(value, 1.5 * 0.25 * total, rtol=1e-5)


def test_consolidated_terms_are_their_sum_but_for_a_constant():
    rng = np.random.default_rng(0)
    draw = lambda: {"a": {"w": jnp.asarray(rng.normal(size=(3, 2)).astype(np.float32))}}  # noqa: E731
    weight = lambda: jax.tree.map(lambda leaf: jnp.square(leaf).at[0].set(0), draw())  # noqa: E731
    terms = [EWC(draw(), weight(), strength) for strength in (3.0, 0.5, 40.0)]
    whole = consolidate(consolidate(terms[0], terms[1]), terms[2])
    model = function(lambda params, x: x, draw())

    def value_and_pull(loss, at):
        return jax.value_and_grad(lambda params: loss(model.with_params(params), {}, None)[0])(at)

    differences = []
    for at in (draw(), draw()):
        value, pull = value_and_pull(whole, at)
        expected, expected_pull = value_and_pull(terms[0] + terms[1] + terms[2], at)
        np.testing.assert_allclose(pull["a"]["w"], expected_pull["a"]["w"], rtol=1e-4, atol=1e-4)
        differences.append(float(value - expected))
    assert differences[0] < -1  # the constant is not 0
    np.testing.assert_allclose(*differences, rtol=1e-4)
    with pytest.raises(ValueError, match="'a/w', which the later one lacks"):
        consolidate(terms[0], EWC({"b": 0.0}, {"b": jnp.ones(())}, 1.0))


def test_l2sp_pulls_old_leaves_to_the_anchor_and_new_ones_to_zero():
    model = function(
        lambda params, x: x, {"body": {"w": jnp.array([1.0, 2.0])}, "head": {"w": jnp.array([4.0])}}
    )
    loss = L2SP({"body": {"w": jnp.array([0.0, 5.0])}}, alpha=0.3, beta=0.7)
    (value, aux), gradient = jax.value_and_grad(
        lambda params: loss(model.with_params(params), {}, None), has_aux=True
    )(model.params)
    np.testing.assert_allclose(value, 0.15 * (1 + 9) + 0.35 * 16, rtol=1e-6)
    np.testing.assert_allclose(gradient["body"]["w"], [0.3, -0.9], rtol=1e-6)
    np.testing.assert_allclose(gradient["head"]["w"], [2.8], rtol=1e-6)
    assert float(aux.metrics["distance"]) == 10


@pytest.mark.parametrize("kind", ["lacking", "shape"])
def test_an_anchor_that_does_not_fit_is_named(softmax, kind):
    model, _, _ = softmax
    leaf = {"kernal": jnp.zeros((D, C))} if kind == "lacking" else {"kernel": jnp.zeros((D, C + 1))}
    message = "out/kernal.*near misses.*out/kernel" if kind == "lacking" else r"shape \(5, 4\).*\(5, 3\)"
    for loss in (L2SP({"out": leaf}, 1.0, 1.0), EWC(model.params, {"out": leaf}, 1.0)):
        with pytest.raises(ValueError, match=message):
            loss(model, {}, None)
    with pytest.raises(ValueError, match="'out/bias', which the anchor lacks"):
        EWC({"out": {"kernel": jnp.zeros((D, C))}}, {"out": {"bias": jnp.zeros(C)}}, 1.0)(model, {}, None)


def test_an_anchored_run_stays_nearer(softmax):
    model, batch, _ = softmax
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    weight = fisher(model, [batch])
    distances = []
    for loss in (
        Classify(),
        Classify() + 0.5 * EWC(model.params, weight, 50.0),
        Classify() + L2SP(model.params, 1.0, 0.0),
    ):
        step = make_step(loss, optax.sgd(0.1), finetune.train_all(model))
        state = step.init(model, jax.random.key(0))
        for _ in range(30):
            state, _ = step(state, batch)
        distances.append(float(tree.norm(tree.sub(state.model.params, model.params))))
    assert distances[1] < distances[0] / 2 and distances[2] < distances[0] / 2
