"""Each loss on arrays: against its formula in NumPy, at its edges, with padding rows, with input that does not fit."""

import functools
import itertools

import distill_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import distill, rows

B, C = 6, 5
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


LABEL = rng.integers(0, C, B)
S, T = normal(B, C) * 2, normal(B, C) * 3
ONE_HOT = np.where(np.arange(C)[None] == LABEL[:, None], 200.0, -200.0).astype(np.float32)
VECTORS = normal(B, 4), normal(B, 7)
MAPS = normal(B, 6, 6, 3), normal(B, 6, 6, 3)
SECOND = normal(B, 6, 6, 4), normal(B, 6, 6, 4)

LOGITS = {
    "soft_targets": (
        lambda s, t, y, T, w: distill.soft_targets(s, t, T, w),
        lambda s, t, y, T: oracles.soft_targets(s, t, T),
    ),
    "dkd": (
        lambda s, t, y, T, w: distill.dkd(s, t, y, T, w, alpha=1.5, beta=8.0),
        lambda s, t, y, T: oracles.dkd(s, t, y, T, 1.5, 8.0),
    ),
    "dist": (
        lambda s, t, y, T, w: distill.dist(s, t, T, w, beta=1.5, gamma=0.7),
        lambda s, t, y, T: oracles.dist(s, t, T, 1.5, 0.7),
    ),
}
LAYERS = {
    "hint": (distill.hint, oracles.hint, MAPS),
    "attention": (distill.attention_transfer, oracles.attention_transfer, (MAPS[0], SECOND[1])),
    "attention_squared": (
        lambda s, t, w=None: distill.attention_transfer(s, t, w, squared=True),
        lambda s, t: oracles.attention_transfer(s, t, squared=True),
        MAPS,
    ),
    "pkt": (distill.pkt, oracles.pkt, VECTORS),
    "similarity": (distill.similarity, oracles.similarity, VECTORS),
    "similarity_of_maps": (distill.similarity, oracles.similarity, (MAPS[0], SECOND[1])),
    "rkd_distance": (distill.rkd_distance, oracles.rkd_distance, VECTORS),
    "rkd_angle": (distill.rkd_angle, oracles.rkd_angle, VECTORS),
    "hierarchical_context": (distill.hierarchical_context, oracles.hierarchical_context, MAPS),
}


def arrays(*values):
    return tuple(jnp.asarray(value) for value in values)


def fsp_of(s, t, w=None):
    return distill.fsp((s, s[..., :2]), (t, t[..., :2]), w)


LAYERS["fsp"] = (fsp_of, lambda s, t: oracles.fsp((s, s[..., :2]), (t, t[..., :2])), MAPS)


@functools.cache
def compiled(name):
    """Value and gradient of a loss, ``(s, t, [y, T,] weight)``: one compilation serves all tests of it."""
    ours = (LOGITS if name in LOGITS else LAYERS)[name][0]
    return jax.jit(jax.value_and_grad(ours))


def evaluate(name, s, t, *rest, weight=None):
    weight = jnp.ones(len(s)) if weight is None else weight
    return compiled(name)(*arrays(s, t, *rest), weight)


@pytest.mark.parametrize("teacher", ["random", "one_hot"])
@pytest.mark.parametrize("name", LOGITS)
def test_losses_of_logits(name, teacher):
    t = ONE_HOT if teacher == "one_hot" else T
    for temperature in (1.0, 2.5, 4.0, 20.0):
        found, gradient = evaluate(name, S, t, LABEL, temperature)
        np.testing.assert_allclose(found, LOGITS[name][1](S, t, LABEL, temperature), rtol=2e-5)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4
    if teacher == "random":
        found = jax.jit(lambda *args: LOGITS[name][0](*args, None))(*arrays(S, t, LABEL, 20.0))
        np.testing.assert_allclose(found, LOGITS[name][1](S, t, LABEL, 20.0), rtol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_losses_of_layers(name):
    ours, oracle, (s, t) = LAYERS[name]
    found, gradient = evaluate(name, s, t)
    np.testing.assert_allclose([found, jax.jit(ours)(*arrays(s, t))], oracle(s, t), rtol=2e-5)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6


def test_no_two_losses_agree():
    values = {name: float(evaluate(name, S, T, LABEL, 4.0)[0]) for name in LOGITS}
    values |= {name: float(evaluate(name, *LAYERS[name][2])[0]) for name in LAYERS}
    for (a, x), (b, y) in itertools.combinations(values.items(), 2):
        assert abs(x - y) > 1e-3 * max(x, y), (a, b)


@pytest.mark.parametrize("name", [*LOGITS, *LAYERS])
def test_rows_of_weight_zero_are_left_out(name):
    weight = jnp.array([1.0, 1, 0, 1, 1, 0])
    real = np.flatnonzero(weight)
    if name in LOGITS:
        found, gradient = evaluate(name, S, T, LABEL, 2.0, weight=weight)
        expected = LOGITS[name][1](S[real], T[real], LABEL[real], 2.0)
    else:
        _, oracle, (s, t) = LAYERS[name]
        found, gradient = evaluate(name, s, t, weight=weight)
        expected = oracle(s[real], t[real])
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert not np.abs(gradient[np.flatnonzero(weight == 0)]).any()


@pytest.mark.parametrize("name", [*LAYERS, *LOGITS])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    s = T if name in LOGITS else LAYERS[name][2][0]
    value, gradient = evaluate(name, s, s, *((LABEL, 4.0) if name in LOGITS else ()))
    assert abs(value) < 1e-5 and np.isfinite(gradient).all()
    # A norm that is not squared has slope 1 right beside its minimum, where rounding leaves it.
    assert np.abs(gradient).max() < (0.1 if name == "attention" else 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_zeros_and_equal_rows_give_no_nan(name):
    s, t = LAYERS[name][2]
    for constant in (0.0, 1.0):
        found, gradient = evaluate(name, np.full_like(s, constant), t)
        assert np.isfinite(found) and np.isfinite(gradient).all()


def test_the_gradient_of_soft_targets_keeps_its_size():
    # Hinton et al. 2015, section 2.1: at a high temperature it is that of half the squared distance of centred logits.
    centred = [jnp.asarray(x - x.mean(-1, keepdims=True)) for x in (S, T)]
    found = jax.grad(lambda s: distill.soft_targets(s, centred[1], 1e3))(centred[0])
    np.testing.assert_allclose(found, (centred[0] - centred[1]) / C / B, rtol=1e-2, atol=1e-4)


def test_soft_targets_fall_into_the_parts_of_dkd():
    target, others = distill.dkd_parts(*arrays(S, T, LABEL), 3.0)
    p = oracles.softmax(T, 3.0)[np.arange(B), LABEL]
    whole = 9 * jnp.mean(target + (1 - jnp.asarray(p)) * others)
    np.testing.assert_allclose(whole, distill.soft_targets(*arrays(S, T), 3.0), rtol=1e-5)


def test_two_classes():
    s, t, y = arrays(S[:, :2], T[:, :2], LABEL % 2)
    target, others = distill.dkd_parts(s, t, y, 2.0)
    np.testing.assert_allclose(others, np.zeros(B), atol=1e-7)
    np.testing.assert_allclose(4 * target.mean(), distill.soft_targets(s, t, 2.0), rtol=1e-5)
    np.testing.assert_allclose(distill.soft_targets(s, t, 2.0), oracles.soft_targets(s, t, 2.0), rtol=1e-5)
    value, inter = jax.jit(jax.value_and_grad(lambda s: distill.dist(s, t, gamma=0.0)))(s)
    np.testing.assert_allclose(value, oracles.dist(s, t, 1.0, 1.0, 0.0), rtol=1e-5)
    np.testing.assert_allclose(inter, np.zeros((B, 2)), atol=1e-5)


def test_a_label_outside_the_classes_is_nan_unless_its_row_is_padding():
    label = jnp.asarray(LABEL).at[0].set(C)
    assert np.isnan(distill.dkd(*arrays(S, T), label))
    assert np.isfinite(distill.dkd(*arrays(S, T), label, weight=jnp.ones(B).at[0].set(0)))


def test_hints_per_token_and_per_unit():
    s, t = arrays(normal(2, 3, 4), normal(2, 3, 4))
    mask = jnp.array([[1.0, 1, 0], [1, 0, 0]])
    tokens = [0.5 * np.sum((t[i] - s[i]) ** 2) for i in ((0, 0), (0, 1), (1, 0))]
    np.testing.assert_allclose(distill.hint(s, t, mask), np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(distill.hint(s, t, mask, over_units="mean"), np.mean(tokens) / 4, rtol=1e-5)
    np.testing.assert_allclose(distill.hint(s, t, over_units="mean"), 0.5 * np.mean((t - s) ** 2), rtol=1e-5)


def test_crd():
    s, t, bank = (np.asarray(rows.unit(jnp.asarray(normal(*shape)))) for shape in ((4, 8), (4, 8), (4, 3, 8)))
    positive, negative = (s * t).sum(-1), np.einsum("bd,bnd->bn", s, bank)
    for temperature in (0.07, 0.5):
        found = distill.crd(*arrays(positive, negative), 50, temperature)
        np.testing.assert_allclose(found, oracles.crd(s, t, range(4), bank, 50, temperature), rtol=1e-4)
    weight = jnp.array([1.0, 0, 1, 0])
    found = distill.crd(*arrays(positive, negative), 50, 0.5, weight)
    np.testing.assert_allclose(found, oracles.crd(s, t, (0, 2), bank, 50, 0.5), rtol=1e-4)


def test_rkd_ignores_scale_and_turns():
    s = jnp.asarray(VECTORS[0])
    turn, _ = np.linalg.qr(normal(4, 4))
    for loss in (distill.rkd_distance, distill.rkd_angle):
        np.testing.assert_allclose(loss(3.0 * s @ turn + 1.0, s), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: distill.soft_targets(*arrays(S, T[:, :4])),
            r"logits: the student gives \(6, 5\), the teacher \(6, 4\)",
        ),
        (lambda: distill.dkd(*arrays(S, T[:, :4], LABEL)), "same classes"),
        (lambda: distill.dist(*arrays(S, T[:4])), "same rows"),
        (lambda: distill.hint(*arrays(*VECTORS)), "put a regressor"),
        (lambda: distill.attention_transfer(*arrays(MAPS[0], MAPS[1][:, :4])), "all axes but the last"),
        (lambda: distill.attention_transfer(*arrays(*VECTORS)), "one between the first and the last"),
        (lambda: distill.fsp(arrays(MAPS[0], SECOND[0]), arrays(MAPS[1], MAPS[1])), "put regressors"),
        (lambda: distill.fsp_matrix(*arrays(MAPS[0], SECOND[0][:, :3])), "same positions"),
        (
            lambda: distill.pkt(*arrays(VECTORS[0], VECTORS[1][:3])),
            "PKT: the student gives 6 rows, the teacher 3",
        ),
        (lambda: distill.similarity(*arrays(VECTORS[0], VECTORS[1][:3])), "one batch for both"),
        (lambda: distill.rkd_angle(*arrays(VECTORS[0], VECTORS[1][:3])), "one batch for both"),
        (lambda: distill.hierarchical_context(*arrays(MAPS[0], SECOND[0])), "level by level"),
    ],
)
def test_input_that_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
