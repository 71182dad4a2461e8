"""Every gradient against closed forms on quadratics, and against a plain loop on a small net."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import meta, tree
from jtl.data.batches.episodes import sinusoids
from jtl.loss import Aux

TASKS, N = 3, 4


@pytest.fixture(scope="module")
def quadratic():
    """Tasks ½ (θ − target)ᵀ A (θ − target), other A and target in support and query, all in float64."""
    rng = np.random.default_rng(0)

    def part():
        roots = rng.normal(size=(TASKS, N, N))
        return {
            "A": roots @ roots.swapaxes(1, 2) / N + 0.1 * np.eye(N),
            "target": rng.normal(size=(TASKS, N)),
        }

    return {"theta": rng.normal(size=N), "support": part(), "query": part()}


def loss(params, batch, key):
    """On a tree of two leaves, so that labels have something to choose."""
    away = jnp.concatenate([params["body"], params["head"]]) - batch["target"]
    value = 0.5 * away @ batch["A"] @ away
    return value, Aux({"half": value / 2}, {})


def as_tree(theta):
    return {"body": jnp.asarray(theta[:3], jnp.float32), "head": jnp.asarray(theta[3:], jnp.float32)}


def flat(found):
    return np.concatenate([found["body"], found["head"]])


def run(gradient, quadratic, **extra):
    batch = {
        "support": {name: jnp.asarray(x, jnp.float32) for name, x in quadratic["support"].items()},
        "query": {name: jnp.asarray(x, jnp.float32) for name, x in quadratic["query"].items()},
        **extra,
    }
    return jax.jit(lambda theta, batch: gradient(loss, theta, batch, jax.random.key(0)))(
        as_tree(quadratic["theta"]), batch
    )


def closed(quadratic, steps, rate, mask=None):
    """φ of every task after the inner loop, dφ/dθ, and the query's loss and gradient there."""
    theta, support, query = quadratic["theta"], quadratic["support"], quadratic["query"]
    mask = np.ones(N) if mask is None else mask
    phis, jacobians = [], []
    for A, target in zip(support["A"], support["target"], strict=True):
        one = np.eye(N) - rate * mask[:, None] * A
        power = np.linalg.matrix_power(one, steps)
        phis.append(target + power @ (theta - target))
        jacobians.append(power)
    away = np.array(phis) - query["target"]
    slopes = np.einsum("tij,tj->ti", query["A"], away)
    return np.array(phis), np.array(jacobians), 0.5 * np.sum(away * slopes, 1), slopes


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("remat", [False, True])
def test_maml_of_a_quadratic(quadratic, remat, chunk):
    (value, aux), found = run(meta.maml(steps=5, rate=0.3, remat=remat, chunk=chunk), quadratic)
    _, jacobians, values, slopes = closed(quadratic, 5, 0.3)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    np.testing.assert_allclose(flat(found), np.einsum("tij,ti->j", jacobians, slopes) / TASKS, atol=1e-5)
    np.testing.assert_allclose(aux.metrics["half"], values.mean() / 2, rtol=1e-5)
    assert float(aux.metrics["diverged"]) == 0


def test_first_order_maml_of_a_quadratic(quadratic):
    _, found = run(meta.maml(steps=5, rate=0.3, first_order=True), quadratic)
    *_, slopes = closed(quadratic, 5, 0.3)
    np.testing.assert_allclose(flat(found), slopes.mean(0), atol=1e-5)


@pytest.mark.parametrize("adapted", ["head", "body"], ids=["anil", "boil"])
def test_what_does_not_adapt_is_shared_and_gets_its_gradient(quadratic, adapted):
    mask = np.array([0, 0, 0, 1.0]) if adapted == "head" else np.array([1.0, 1, 1, 0])
    labels = {"body": float(adapted == "body"), "head": float(adapted == "head")}
    _, found = run(meta.maml(steps=2, rate=0.3, labels=labels), quadratic)
    _, jacobians, _, slopes = closed(quadratic, 2, 0.3, mask)
    np.testing.assert_allclose(flat(found), np.einsum("tij,ti->j", jacobians, slopes) / TASKS, atol=1e-5)


def test_rates_by_leaf_and_by_step(quadratic):
    labels = {"body": 0.5, "head": lambda step: jnp.where(step == 0, 1.0, 0.0)}
    _, found = run(meta.reptile(steps=2, rate=0.3, labels=labels), quadratic)
    moved = []
    for A, target in zip(quadratic["support"]["A"], quadratic["support"]["target"], strict=True):
        phi = quadratic["theta"]
        for head in (1.0, 0.0):
            phi = phi - 0.3 * np.array([0.5, 0.5, 0.5, head]) * (A @ (phi - target))
        moved.append(phi)
    np.testing.assert_allclose(flat(found), quadratic["theta"] - np.mean(moved, 0), atol=1e-5)


def test_the_loss_over_all_steps(quadratic):
    weights = np.array([[0.2, 0.3, 0.5]] * TASKS)
    (value, aux), found = run(
        meta.maml(steps=3, rate=0.3, multi_step=True),
        quadratic,
        step_weight=jnp.asarray(weights, jnp.float32),
    )
    parts = [closed(quadratic, k, 0.3) for k in (1, 2, 3)]
    expected = sum(w * values.mean() for w, (_, _, values, _) in zip(weights[0], parts, strict=True))
    slope = sum(w * np.einsum("tij,ti->j", J, g) for w, (_, J, _, g) in zip(weights[0], parts, strict=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(flat(found), slope / TASKS, atol=1e-5)
    np.testing.assert_allclose(aux.metrics["half"], parts[-1][2].mean() / 2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"batch\['step_weight'\]"):
        run(meta.maml(steps=3, rate=0.3, multi_step=True), quadratic)


def test_step_weights_go_from_even_to_the_last():
    np.testing.assert_allclose(meta.step_weights(5, 0.0), [0.2] * 5, rtol=1e-6)
    np.testing.assert_allclose(meta.step_weights(5, 1.0), [0.006] * 4 + [0.976], rtol=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1, got 7"):
        meta.step_weights(5, 7.0)


def test_reptile_moves_towards_the_adapted(quadratic):
    (value, _), found = run(meta.reptile(steps=4, rate=0.3), quadratic)
    phis, _, values, _ = closed(quadratic, 4, 0.3)
    np.testing.assert_allclose(flat(found), quadratic["theta"] - phis.mean(0), atol=1e-5)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)


def test_reptile_with_adam_without_momentum(quadratic):
    _, found = run(meta.reptile(steps=3, rate=optax.adam(0.1, b1=0.0)), quadratic)
    moved = []
    for A, target in zip(quadratic["support"]["A"], quadratic["support"]["target"], strict=True):
        phi, second = quadratic["theta"], np.zeros(N)
        for t in (1, 2, 3):
            g = A @ (phi - target)
            second = 0.999 * second + 0.001 * g**2
            phi = phi - 0.1 * g / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        moved.append(phi)
    np.testing.assert_allclose(flat(found), quadratic["theta"] - np.mean(moved, 0), atol=1e-5)


def test_imaml_of_a_quadratic(quadratic):
    strength = 2.0
    gradient = meta.imaml(steps=100, rate=0.2, regularisation=strength, cg_steps=N)
    (value, aux), found = run(gradient, quadratic)
    expected, values = [], []
    for t in range(TASKS):
        A, a = (quadratic["support"][name][t] for name in ("A", "target"))
        B, b = (quadratic["query"][name][t] for name in ("A", "target"))
        phi = np.linalg.solve(A + strength * np.eye(N), A @ a + strength * quadratic["theta"])
        values.append(0.5 * (phi - b) @ B @ (phi - b))
        expected.append(np.linalg.solve(np.eye(N) + A / strength, B @ (phi - b)))
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(flat(found), np.mean(expected, 0), atol=1e-5)
    assert float(aux.metrics["cg_residual"]) < 1e-5


def unrolled_proximal(quadratic, strength, steps, mask):
    """MAML's gradient through the proximal inner loop, step by step: what iMAML approaches."""
    total = 0.0
    for t in range(TASKS):
        A, a = (quadratic["support"][name][t] for name in ("A", "target"))
        B, b = (quadratic["query"][name][t] for name in ("A", "target"))
        phi, jacobian = quadratic["theta"], np.eye(N)
        for _ in range(steps):
            phi = phi - 0.2 * mask * (A @ (phi - a) + strength * (phi - quadratic["theta"]))
            pulled = A @ jacobian + strength * (jacobian - np.eye(N))
            jacobian = jacobian - 0.2 * mask[:, None] * pulled
        total = total + jacobian.T @ B @ (phi - b)
    return total / TASKS


@pytest.mark.parametrize("labels", [None, {"body": 1.0, "head": 0.0}], ids=["all", "body"])
def test_imaml_approaches_the_unrolled_gradient(quadratic, labels):
    mask = np.ones(N) if labels is None else np.array([1.0, 1, 1, 0])
    exact = unrolled_proximal(quadratic, 1.0, 100, mask)

    def error(steps, cg_steps):
        gradient = meta.imaml(steps=steps, rate=0.2, regularisation=1.0, cg_steps=cg_steps, labels=labels)
        return float(np.abs(flat(run(gradient, quadratic)[1]) - exact).max())

    assert error(2, N) > 1e-2 and error(100, 1) > 1e-2 and error(100, N) < 1e-5


def test_imaml_needs_a_proximal_term():
    with pytest.raises(ValueError, match="regularisation must be over 0, got 0"):
        meta.imaml(steps=1, rate=0.1, regularisation=0.0)


# --- a net ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (1, 8)), "bias": jax.random.normal(keys[1], (8,))},
        "out": {"kernel": 0.3 * jax.random.normal(keys[2], (8, 1))},
    }


def forward(params, x):
    return jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None]) @ params["out"]["kernel"]


def squared(params, batch, key):
    return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2), Aux({}, {})


@pytest.fixture(scope="module")
def waves():
    return sinusoids(jax.random.key(2), tasks=2, shots=5, queries=7)


def plain_loop(net, waves, steps, rate, first_order=False):
    def value(params):
        total = 0.0
        for t in range(2):
            own, new = (jax.tree.map(lambda x, t=t: x[t], waves[part]) for part in ("support", "query"))
            phi = params
            for _ in range(steps):
                slope = jax.grad(lambda p, own=own: squared(p, own, None)[0])(phi)
                if first_order:
                    slope = jax.lax.stop_gradient(slope)
                phi = jax.tree.map(lambda p, g: p - rate * g, phi, slope)
            total += squared(phi, new, None)[0]
        return total / 2

    return jax.jit(jax.value_and_grad(value))(net)


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_of_a_net_is_the_unrolled_loop(net, waves, first_order):
    gradient = meta.maml(steps=2, rate=0.05, first_order=first_order)
    (value, _), found = jax.jit(lambda p: gradient(squared, p, waves, jax.random.key(0)))(net)
    expected_value, expected = plain_loop(net, waves, 2, 0.05, first_order)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert tree.flatten(found).keys() == tree.flatten(expected).keys()
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(found)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parity
def test_maml_of_a_net_is_torchs(net, waves):
    torch = pytest.importorskip("torch")
    params = {
        path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in tree.flatten(net).items()
    }

    def cost(p, part, t):
        x, y = (torch.tensor(np.asarray(waves[part][name][t])) for name in ("x", "y"))
        return ((torch.tanh(x @ p["first/kernel"] + p["first/bias"]) @ p["out/kernel"] - y) ** 2).mean()

    total = 0.0
    for t in range(2):
        phi = dict(params)
        for _ in range(3):
            slopes = torch.autograd.grad(cost(phi, "support", t), list(phi.values()), create_graph=True)
            phi = {name: p - 0.05 * g for (name, p), g in zip(phi.items(), slopes, strict=True)}
        total = total + cost(phi, "query", t) / 2
    total.backward()
    maml = meta.maml(steps=3, rate=0.05)
    (value, _), found = jax.jit(lambda p: maml(squared, p, waves, jax.random.key(0)))(net)
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    for path, leaf in tree.flatten(found).items():
        np.testing.assert_allclose(leaf, params[path].grad.numpy(), atol=1e-5, err_msg=path)
