"""SI, A-GEM, PackNet, replay and a head for each task: their equations, and what must not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, heads, tree
from jtl.continual import Rehearse, agem, packnet, task_heads
from jtl.data import Arrays
from jtl.data.batches.loader import Batches
from jtl.finetune import SI
from jtl.model import linen
from jtl.models.mlp import MLP
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

C = 3


def body(seed=0):
    return linen(MLP((8, 6)), MLP((8, 6)).init(jax.random.key(seed), jnp.zeros((1, 5))))


def mlp(seed=0):
    return heads.classifier(body(seed), C, key=jax.random.key(seed), on="features", width=6)


def rows(n, seed=0, **columns):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(n, 5)).astype(np.float32),
        "label": rng.integers(0, C, n).astype(np.int32),
        **{name: np.full(n, value, np.int32) for name, value in columns.items()},
    }


# --- SI --------------------------------------------------------------------------------------------


def quadratic(params, x):
    return {"value": x * params["w"]}


def bowl(model, batch, key):
    """½ Σ a w², and the penalty of the model's own loss if there is one."""
    from jtl.loss import Aux

    return 0.5 * jnp.sum(batch["a"] * jnp.square(model.params["w"])), Aux({}, {})


def test_path_integral_is_the_sum_of_gradient_times_move():
    a, w, rate = np.array([1.0, 4.0, 0.0]), np.array([2.0, -1.0, 3.0]), 0.1
    model = function(quadratic, {"w": jnp.asarray(w, jnp.float32)})
    step = make_step(bowl, finetune.track(optax.sgd(rate)))
    state = step.init(model, jax.random.key(0))
    omega, now = np.zeros(3), w.copy()
    for _ in range(50):
        state, _ = step(state, {"a": jnp.asarray(a, jnp.float32)})
        omega += (a * now) * (rate * a * now)
        now = now - rate * a * now
    np.testing.assert_allclose(state.opt_state.path["w"], omega, rtol=1e-4)
    found = finetune.path_importance(state.opt_state, model.params, state.model.params, damping=0.1)
    np.testing.assert_allclose(found["w"], omega / ((now - w) ** 2 + 0.1), rtol=1e-4)
    # With small steps each entry's sum is the loss that its own moves took away.
    np.testing.assert_allclose(omega, 0.5 * a * (w**2 - now**2), rtol=0.3)
    twice = finetune.path_importance(
        state.opt_state, model.params, state.model.params, before={"w": jnp.ones(3)}
    )
    np.testing.assert_allclose(twice["w"], found["w"] + 1, rtol=1e-6)


def test_the_penaltys_own_gradient_is_none_of_the_tasks():
    model = function(quadratic, {"w": jnp.array([1.0, 2.0])})
    penalty = SI({"w": jnp.array([0.0, 5.0])}, {"w": jnp.array([3.0, 0.5])}, strength=0.7)
    batch = {"a": jnp.array([1.0, 4.0])}

    def both(model, batch, key):
        value, aux = bowl(model, batch, key)
        return value + penalty(model, batch, key)[0], aux

    step = make_step(both, finetune.track(optax.sgd(0.1), penalty))
    state, _ = step(step.init(model, jax.random.key(0)), batch)
    w = np.array([1.0, 2.0])
    task = np.array([1.0, 4.0]) * w
    whole = task + 2 * 0.7 * np.array([3.0, 0.5]) * (w - np.array([0.0, 5.0]))
    np.testing.assert_allclose(state.model.params["w"], w - 0.1 * whole, rtol=1e-5)
    np.testing.assert_allclose(state.opt_state.path["w"], task * 0.1 * whole, rtol=1e-5)


def test_si_names_what_does_not_fit():
    model = function(quadratic, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="the importance of SI has 'v', which the model lacks"):
        SI(model.params, {"v": jnp.ones(2)}, 1.0)(model, {}, None)


def test_tracking_changes_no_update_and_leaves_frozen_leaves_out():
    model, batch = mlp(), rows(8)
    labels = finetune.train_only(model, "head/.*|dense_1/.*")
    moved = []
    for optimizer in (optax.adam(0.01), finetune.track(optax.adam(0.01))):
        step = make_step(Classify(), optimizer, labels)
        state = step.init(model, jax.random.key(0))
        for _ in range(3):
            state, _ = step(state, batch)
        moved.append(state.model.params)
    jax.tree.map(np.testing.assert_array_equal, *moved)
    assert not [path for path in tree.flatten(state.opt_state.path) if "dense_0" in path]


# --- A-GEM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", [True, False])
def test_agem_projects_only_what_points_against_the_memory(against):
    loss = lambda w, batch, key: (jnp.vdot(w, batch["g"]), __import__("jtl").Aux({}, {}))  # noqa: E731
    g, r = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.5, 1.0, 2.0], np.float32)
    r = r if against == (g @ r < 0) else -r
    (value, aux), found = agem(
        loss, jnp.ones(3), {"current": {"g": g}, "memory": {"g": r}}, jax.random.key(0)
    )
    expected = g - (g @ r) / (r @ r) * r if against else g
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(value) == pytest.approx(g.sum()) and float(aux.metrics["projected"]) == against
    assert float(np.dot(found, r)) >= -1e-6


def test_agem_in_a_step_with_its_batches():
    current, memory = rows(16, 1), Arrays(rows(5, 2))
    batches = Rehearse(Batches(Arrays(current), 4, epochs=2), memory, rows=3, apart=True)
    step = make_step(Classify(), optax.sgd(0.1), gradient=agem)
    state = step.init(mlp(), jax.random.key(0))
    for batch in batches:
        assert set(batch) == {"current", "memory"} and len(batch["memory"]["x"]) == 3
        state, metrics = step(state, batch)
    assert len(batches) == 8 and float(metrics["projected"]) in (0.0, 1.0)


def test_rehearsed_rows_come_from_the_memory_and_differ_by_step():
    current, memory = rows(16, 1), Arrays(rows(9, 2))
    batches = Rehearse(Batches(Arrays(current), 4), memory, rows=3, seed=1)
    first, again = batches[0], batches[0]
    np.testing.assert_array_equal(first["index"], again["index"])
    assert first["x"].shape == (7, 5) and first["weight"].sum() == 7
    np.testing.assert_array_equal(first["x"][4:], memory.arrays["x"][first["index"][4:]])
    assert len({tuple(batch["index"][4:]) for batch in batches}) == len(batches)
    assert all(len(set(batch["index"][4:])) == 3 for batch in batches)
    with pytest.raises(ValueError, match=r"the memory \['index', 'label', 'task', 'weight', 'x'\]"):
        Rehearse(Batches(Arrays(current), 4), Arrays(rows(9, task=0)), rows=3)[0]


# --- heads -----------------------------------------------------------------------------------------


def test_each_row_meets_the_head_of_its_task_alone():
    model = task_heads(body(), 4, C, key=jax.random.key(1), on="features", width=6)
    batch = {**rows(6), "task": np.array([0, 3, 1, 1, 2, 0], np.int32)}
    out = model.params["head"]["out"]
    features = np.asarray(model(batch)["features"])
    for row, task in enumerate(batch["task"]):
        own = slice(task * C, task * C + C)
        expected = features[row] @ np.asarray(out["kernel"])[:, own] + np.asarray(out["bias"])[own]
        np.testing.assert_allclose(model(batch)["logits"][row], expected, atol=1e-6)
    one = {**batch, "task": np.full(6, 2, np.int32)}
    gradient = jax.grad(lambda p: Classify()(model.with_params(p), one, None)[0])(model.params)
    touched = np.abs(np.asarray(gradient["head"]["out"]["kernel"])).sum(0).reshape(4, C).sum(1)
    assert touched[2] > 0 and (np.delete(touched, 2) == 0).all()
    with pytest.raises(KeyError, match=r"reads batch\['task'\]"):
        model(rows(2))


# --- PackNet ---------------------------------------------------------------------------------------


def train(model, labels=None, steps=5, seed=0):
    step = make_step(Classify(), optax.adam(0.05), labels)
    state = step.init(model, jax.random.key(0))
    for number in range(steps):
        state, _ = step(state, rows(16, seed + number))
    return state.model


@pytest.fixture(scope="module")
def two_tasks():
    """A network at the end of task 1, after its pruning, and during task 2."""
    first = train(packnet.pack(mlp(), "dense_.*/kernel"))
    pruned = train(packnet.prune(first, keep=0.25))
    labels = finetune.train_only(pruned, "dense_.*/kernel")
    return first, pruned, train(packnet.next_task(pruned), labels, seed=50)


def test_packing_changes_nothing_at_first():
    model, batch = mlp(), rows(6)
    packed = packnet.pack(model, "dense_.*/kernel")
    np.testing.assert_array_equal(packed(batch)["logits"], model(batch)["logits"])


def test_pruning_keeps_the_largest_share_of_each_leaf(two_tasks):
    first, _, _ = two_tasks
    pruned = packnet.prune(first, keep=0.25)
    for name in ("dense_0", "dense_1"):
        before, after = (np.asarray(m.params[name]["kernel"]) for m in (first, pruned))
        owner = np.asarray(pruned.variables["packnet"]["owner"][name]["kernel"])
        kept = owner == 1
        assert kept.sum() == round(0.25 * before.size) and set(np.unique(owner)) == {0, 1}
        assert np.abs(before[kept]).min() >= np.abs(before[~kept]).max()
        np.testing.assert_array_equal(after, np.where(kept, before, 0))


def test_retraining_moves_the_kept_weights_alone(two_tasks):
    first, retrained, _ = two_tasks
    pruned = packnet.prune(first, keep=0.25)
    owner = np.asarray(pruned.variables["packnet"]["owner"]["dense_0"]["kernel"])
    before, after = (np.asarray(m.params["dense_0"]["kernel"]) for m in (pruned, retrained))
    assert (after[owner == 0] == 0).all() and (after[owner == 1] != before[owner == 1]).all()


def test_the_first_task_is_bit_identical_after_the_second(two_tasks):
    _, one, two = two_tasks
    batch = rows(8, 9)
    answer = jax.jit(lambda model, batch: model(batch)["logits"])
    np.testing.assert_array_equal(
        answer(packnet.select(two, 1), batch), answer(packnet.select(one, 1), batch)
    )
    owner = np.asarray(two.variables["packnet"]["owner"]["dense_0"]["kernel"])
    assert set(np.unique(owner)) == {1, 2}
    before, after = (np.asarray(m.params["dense_0"]["kernel"]) for m in (one, two))
    np.testing.assert_array_equal(after[owner == 1], before[owner == 1])
    assert (after[owner == 2] != 0).any()
    assert (answer(two, batch) != answer(packnet.select(two, 1), batch)).any()


def test_packnet_refuses(two_tasks):
    _, one, _ = two_tasks
    with pytest.raises(ValueError, match="no weight belongs to task 3: there are tasks 1 to 1"):
        packnet.select(one, 3)
    with pytest.raises(ValueError, match=r"in \(0, 1\]; got 0"):
        packnet.prune(one, 0.0)
    with pytest.raises(tree.RuleError):
        packnet.pack(mlp(), "conv.*")
