"""Discrepancies between rows of two domains against NumPy: with weights, without, and where none is defined."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jtl import domain
from jtl.rows import squared_distances

N, M, D, C = 8, 6, 5, 3
KEY = jax.random.key(0)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, Y = draw(N, D), 0.7 * draw(M, D, seed=1) + 0.5
PX, PY = softmax(draw(N, C, seed=2)), softmax(draw(M, C, seed=3))
LABEL, LOGITS = np.arange(N) % C, draw(M, C, seed=4)


# --- oracles, in loops -----------------------------------------------------------------------------


def kernels(layers_x, layers_y):
    """The three kernel matrices, multiplied over layers, each layer by its own bandwidth."""
    joint = 1.0
    for x, y in zip(layers_x, layers_y, strict=True):
        z = np.concatenate([x, y])
        n = len(z)
        d2 = np.array([[np.sum((p - q) ** 2) for q in z] for p in z])
        v = d2.sum() / (n * (n - 1))
        joint = joint * sum(np.exp(-d2 / (2 * 2.0**k * v)) for k in range(-3, 2))
    n = len(layers_x[0])
    return joint[:n, :n], joint[n:, n:], joint[:n, n:]


def mmd_oracle(layers_x, layers_y, estimator):
    ss, tt, st = kernels(layers_x, layers_y)
    n, m = len(ss), len(tt)
    if estimator == "biased":
        return ss.mean() + tt.mean() - 2 * st.mean()
    if estimator == "unbiased":
        off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
        return off(ss) + off(tt) - 2 * st.mean()
    pairs = range(0, min(n, m) // 2 * 2, 2)
    return np.mean([ss[i, i + 1] + tt[i, i + 1] - st[i, i + 1] - st[i + 1, i] for i in pairs])


def coral_oracle(x, y):
    return np.sum((np.cov(x, rowvar=False) - np.cov(y, rowvar=False)) ** 2) / (4 * x.shape[1] ** 2)


def bsp_oracle(x, y, count):
    return sum(np.sum(np.sort(np.linalg.eigvalsh(f.T @ f))[-count:]) for f in (x, y))


def afn_oracle_gradient(f, step):
    """d/df of mean (||f|| - const - step)²."""
    return -2 * step * f / np.linalg.norm(f, axis=1, keepdims=True) / len(f)


def mcc_oracle(z, temperature, sure=None):
    p = softmax(z / temperature)
    if sure is None:
        sure = 1 + np.exp((p * np.log(p)).sum(-1))
        sure = len(z) * sure / sure.sum()
    table = np.zeros((z.shape[1],) * 2)
    for row, weight in zip(p, sure, strict=True):
        table += weight * np.outer(row, row)
    table /= table.sum(1, keepdims=True)
    return sum(table[i, j] for i, j in itertools.permutations(range(z.shape[1]), 2)) / z.shape[1]


CASES = {
    **{
        f"mmd_{e}": (
            lambda *a, e=e: domain.mmd(*a, estimator=e), lambda x, y, e=e: mmd_oracle([x], [y], e)
        )
        for e in ("biased", "unbiased", "linear")
    },
    "coral": (domain.coral, coral_oracle),
    "bsp_1": (domain.bsp, lambda x, y: bsp_oracle(x, y, 1)),
    "bsp_3": (lambda *a: domain.bsp(*a, count=3), lambda x, y: bsp_oracle(x, y, 3)),
}  # fmt: skip


def with_junk(x, seed):
    """Rows of weight 0 strewn in, whose content would spoil the result; and the weights."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(len(x) + 3, len(x), replace=False))
    out = np.full((len(x) + 3, *x.shape[1:]), 7.0)
    out[places] = x
    weight = np.zeros(len(out))
    weight[places] = 1
    return jnp.asarray(out, jnp.float32), jnp.asarray(weight, jnp.float32)


def arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


@pytest.mark.parametrize("name", CASES)
def test_against_numpy_and_rows_of_weight_zero_are_left_out(name):
    function, oracle = CASES[name]
    expected = oracle(X, Y)
    np.testing.assert_allclose(jax.jit(function)(*arrays(X, Y)), expected, rtol=2e-4, atol=1e-6)
    (x, a), (y, b) = with_junk(X, 1), with_junk(Y, 2)
    value, gradient = jax.jit(jax.value_and_grad(function))(x, y, a, b)
    np.testing.assert_allclose(value, expected, rtol=2e-4, atol=1e-6)
    gradient = np.asarray(gradient)
    assert (gradient[np.asarray(a) == 0] == 0).all() and np.isfinite(gradient).all()


def test_the_estimators_are_three_different_things():
    # The mean of the unbiased estimate is 0 where both domains are one, and some are below.
    draws = arrays(draw(60, N, D, seed=7), draw(60, N, D, seed=8))
    biased, unbiased, linear = (
        np.asarray(jax.jit(jax.vmap(partial(domain.mmd, estimator=e)))(*draws))
        for e in ("biased", "unbiased", "linear")
    )
    assert linear.std() > 1.2 * unbiased.std()
    assert unbiased.min() < 0 < biased.min()
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 60**0.5 and biased.mean() > 5 * abs(unbiased.mean())


def test_bandwidths_get_no_gradient():
    """The kernel's scale is a constant: the gradient is that of the oracle with its bandwidth held."""
    x, y = arrays(X, Y)
    z = np.concatenate([X, Y])
    n = len(z)
    v = sum(np.sum((p - q) ** 2) for p in z for q in z) / (n * (n - 1))

    def held(x):
        k = lambda a, b: sum(  # noqa: E731
            jnp.exp(-jnp.sum((a[:, None] - b[None]) ** 2, -1) / (2 * 2.0**k * v)) for k in range(-3, 2)
        )
        return k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()

    np.testing.assert_allclose(
        jax.jit(jax.grad(domain.mmd))(x, y), jax.jit(jax.grad(held))(x), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("estimator", ["biased", "unbiased", "linear"])
def test_jan_multiplies_the_kernels_of_its_layers(estimator):
    expected = mmd_oracle([X, PX], [Y, PY], estimator)
    found = jax.jit(partial(domain.jmmd, estimator=estimator))(arrays(X, PX), arrays(Y, PY))
    np.testing.assert_allclose(found, expected, rtol=5e-4, atol=1e-5)
    summed = mmd_oracle([X], [Y], estimator) + mmd_oracle([PX], [PY], estimator)
    assert abs(expected - summed) > 1e-3


def test_mcc_against_numpy():
    z = 3 * draw(9, C, seed=5)
    for temperature in (1.0, 2.5):
        expected = mcc_oracle(z, temperature)
        mcc = jax.jit(partial(domain.mcc, temperature=temperature))
        found = mcc(*arrays(z))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        junk, weight = with_junk(z, 3)
        np.testing.assert_allclose(mcc(junk, weight), expected, rtol=1e-5)
    # The rows' weights are constants: the gradient is that of the oracle with them held.
    sure = 1 + np.exp((softmax(z / 2.5) * np.log(softmax(z / 2.5))).sum(-1))
    sure = len(z) * sure / sure.sum()
    gradient = np.asarray(jax.jit(jax.grad(domain.mcc))(*arrays(z)))
    for i, c in ((0, 0), (4, 2), (8, 1)):
        moved = 1e-5 * np.eye(z.size)[i * C + c].reshape(z.shape)
        slope = (mcc_oracle(z + moved, 2.5, sure) - mcc_oracle(z - moved, 2.5, sure)) / 2e-5
        np.testing.assert_allclose(gradient[i, c], slope, rtol=1e-3, atol=1e-6)
    # Sure and clear predictions are not confused; flat ones as much as can be.
    assert float(domain.mcc(100 * jnp.eye(C))) < 1e-6
    # A class of no probability at all is no 0/0.
    value, gradient = jax.jit(jax.value_and_grad(domain.mcc))(jnp.array([[0.0, 0.0, -900.0]]))
    np.testing.assert_allclose(value, (0.5 + 0.5 + 1) / 3, rtol=1e-6)
    assert bool(jnp.isfinite(gradient).all())


def test_afn_pulls_the_norm_up_by_its_step():
    for step in (0.5, 2.0):
        value, gradient = jax.value_and_grad(lambda f, s=step: domain.afn(f, step=s))(*arrays(X))
        np.testing.assert_allclose(value, step**2, rtol=1e-6)
        np.testing.assert_allclose(gradient, afn_oracle_gradient(X, step), rtol=1e-5, atol=1e-7)
    junk, weight = with_junk(X, 1)
    found = jax.grad(lambda f: domain.afn(f, weight))(junk)
    np.testing.assert_allclose(found[weight > 0], afn_oracle_gradient(X, 1.0), rtol=1e-5, atol=1e-7)


# --- transport -------------------------------------------------------------------------------------


def joint_cost(alpha, beta):
    log_p = np.log(softmax(LOGITS))
    d2 = ((X[:, None] - Y[None]) ** 2).sum(-1)
    return alpha * d2 - beta * log_p[:, LABEL].T


def exact_plan(cost):
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    found = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]
    )
    return found.fun


def test_sinkhorn_has_its_marginals_and_the_form_of_the_optimum():
    cost = joint_cost(1.0, 1.0)
    a, b = np.full(N, 1 / N), np.r_[0.0, np.full(M - 1, 1 / (M - 1))]
    plan = np.asarray(domain.sinkhorn(*arrays(cost, a, b), epsilon=0.5, steps=500), np.float64)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-5)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-6)
    # log P + cost / ε is a sum of a row's and a column's part, which double centring removes.
    rest = np.log(plan[:, 1:]) + cost[:, 1:] / 0.5
    rest = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
    np.testing.assert_allclose(rest, 0, atol=1e-3)


def test_jdot_tends_to_exact_transport():
    arguments = (*arrays(X, Y), jnp.asarray(LABEL), *arrays(LOGITS))
    exact = exact_plan(joint_cost(0.5, 2.0))
    jdot = jax.jit(partial(domain.jdot, alpha=0.5, beta=2.0), static_argnames=("epsilon", "steps"))
    found = [float(jdot(*arguments, epsilon=e, steps=2000)) for e in (1.0, 0.1, 0.005)]
    assert found[0] > found[1] > found[2] and found[2] == pytest.approx(exact, rel=0.01)
    (x, a), (y, b) = with_junk(X, 1), with_junk(Y, 2)
    label = np.full(len(x), -1)
    label[np.asarray(a) > 0] = LABEL
    logits = np.zeros((len(y), C), np.float32)
    logits[np.asarray(b) > 0] = LOGITS
    padded = jdot(x, y, jnp.asarray(label), jnp.asarray(logits), a, b, epsilon=0.1)
    plain = jdot(*arguments, epsilon=0.1)
    np.testing.assert_allclose(padded, plain, rtol=1e-4)
    # The plan is a constant: the gradient is that of Σ P·cost with P held.
    cost = joint_cost(0.5, 2.0)
    a, b = np.full(N, 1 / N), np.full(M, 1 / M)
    plan = np.asarray(domain.sinkhorn(*arrays(cost, a, b), epsilon=0.05 * cost.mean()))
    by_hand = 2.0 * (plan.sum(0)[:, None] * softmax(LOGITS) - plan.T @ np.eye(C)[LABEL])
    gradient = jax.grad(lambda z: jdot(*arguments[:3], z))(arguments[3])
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-3, atol=1e-5)
    assert np.isnan(float(domain.jdot(arguments[0], arguments[1], jnp.full(N, C), arguments[3])))


# --- degenerate batches ----------------------------------------------------------------------------

ALL = {
    **{name: function for name, (function, _) in CASES.items()},
    "jan": lambda x, y, a, b: domain.jmmd((x, jax.nn.softmax(x)), (y, jax.nn.softmax(y)), a, b),
    "jdot": lambda x, y, a, b: domain.jdot(x, y, jnp.zeros(len(x), int), y, a, b, alpha=1.0, beta=1.0),
    "afn": lambda x, y, a, b: domain.afn(x, a) + domain.afn(y, b),
    "mcc": lambda x, y, a, b: domain.mcc(y, b),
    "mdd": lambda x, y, a, b: domain.mdd(x, y, x, y, a, b),
}

CONSTANT = np.tile([[3.0, 1.0, 0.0, -2.0]], (4, 1))
BATCHES = {
    "identical": (draw(4, 4), draw(4, 4), np.ones(4), np.ones(4)),
    "constant": (CONSTANT, CONSTANT, np.ones(4), np.ones(4)),
    "zero": (np.zeros((4, 4)), np.zeros((4, 4)), np.ones(4), np.ones(4)),
    "single": (draw(4, 4), draw(4, 4, seed=1), np.array([0, 1, 0, 0]), np.array([0, 0, 0, 1])),
    "no_target": (draw(4, 4), draw(4, 4, seed=1), np.ones(4), np.zeros(4)),
    "large": (1e3 * draw(4, 4), 1e3 * draw(4, 4, seed=1), np.ones(4), np.ones(4)),
}


@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_are_finite(name):
    run = jax.jit(jax.value_and_grad(ALL[name], argnums=(0, 1)))
    for case, values in BATCHES.items():
        value, gradients = run(*arrays(*values))
        assert bool(jnp.isfinite(value)), case
        assert all(bool(jnp.isfinite(g).all()) for g in gradients), case
        if case in ("identical", "constant", "zero") and name in ("mmd_biased", "coral", "jan"):
            assert abs(float(value)) < 1e-5, case
            assert float(jnp.abs(gradients[0]).max()) < 1e-2, case
        if case == "no_target" and name.startswith(("mmd", "coral", "jan", "jdot", "mcc")):
            assert float(value) == 0
        if case == "single" and name in ("mmd_unbiased", "mmd_linear", "coral"):
            assert float(value) == 0


def test_a_constant_far_from_zero_keeps_its_distances():
    near = np.float32(1e3) + 0.01 * draw(6, 4).astype(np.float32)
    exact = ((near[:, None].astype(np.float64) - near[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(*arrays(near, near)), exact, atol=1e-7)


def test_other_sizes_and_too_few_rows_are_refused():
    x, wide, one = arrays(X, draw(M, D + 1), X[:1])
    for function in (domain.mmd, domain.coral, domain.bsp):
        with pytest.raises(ValueError, match=r"shape \(5,\) and target rows \(6,\)"):
            function(x, wide)
    with pytest.raises(ValueError, match="two rows of each domain for a covariance, found 8 and 1"):
        domain.coral(x, one)
    for estimator in ("unbiased", "linear"):
        with pytest.raises(ValueError, match=f"{estimator} estimator needs two rows"):
            domain.mmd(x, one, estimator=estimator)
    with pytest.raises(ValueError, match="0 target rows"):
        domain.mmd(x, x[:0])
    with pytest.raises(ValueError, match="count must lie between 1 and 1"):
        domain.bsp(x, one, count=2)


# --- the losses read the right rows and layers -------------------------------------------------------


@pytest.mark.slow
def test_losses_are_the_functions_on_the_rows_of_their_domains(model, batch):
    outputs = model(batch)
    f, z = outputs["features"], outputs["logits"]
    d, w = np.asarray(batch["domain"]), np.asarray(batch["weight"])
    s, t = np.flatnonzero((d == 0) & (w > 0)), np.flatnonzero((d == 1) & (w > 0))
    p = jax.nn.softmax(z)
    label = batch["label"][s]
    losses = {
        "dan": domain.DAN(),
        "dan_linear": domain.DAN(on=("features",), estimator="linear"),
        "jan": domain.JAN(),
        "coral": domain.CORAL(),
        "coral_logits": domain.CORAL(on="logits"),
        "mcc": domain.MCC(),
        "bsp": domain.BSP(),
        "afn": domain.AFN(step=2.0),
        "jdot": domain.JDOT(alpha=1.0, beta=1.0),
    }

    @jax.jit
    def expected(f, g, z, u, p, q):
        return {
            "dan": domain.mmd(f, g) + domain.mmd(z, u),
            "dan_linear": domain.mmd(f, g, estimator="linear"),
            "jan": domain.jmmd((f, p), (g, q)),
            "coral": domain.coral(f, g),
            "coral_logits": domain.coral(z, u),
            "mcc": domain.mcc(u),
            "bsp": domain.bsp(f, g),
            "afn": jnp.float32(4.0),
            "jdot": domain.jdot(f, g, label, u, alpha=1.0, beta=1.0),
        }

    values = expected(f[s], f[t], z[s], z[t], p[s], p[t])
    found = jax.jit(lambda batch: {name: loss(model, batch, KEY)[0] for name, loss in losses.items()})(batch)
    for name, loss in losses.items():
        np.testing.assert_allclose(found[name], values[name], rtol=1e-4, err_msg=name)
        with pytest.raises(KeyError, match="needs a column 'domain'"):
            jax.eval_shape(lambda loss=loss: loss(model, {"x": batch["x"], "label": batch["label"]}, KEY)[0])


def test_layers_are_named_or_tapped(model, batch):
    loss = domain.CORAL(on="taps/encoder/layer_3")
    assert loss.mode().taps == ("encoder/layer_3",)
    with pytest.raises(KeyError, match="no 'feature'.*near misses: .'features'"):
        domain.CORAL(on="feature")(model, batch, KEY)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\); expected \(B, D\)"):
        domain.loss.layer({"map": jnp.ones((2, 3, 4))}, "map")
