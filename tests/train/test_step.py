import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, heads, sharding, tree
from jtl.loss import Aux, Loss
from jtl.model import linen
from jtl.tasks import Classify
from jtl.train import accumulate, make_step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False, use_running_average: bool = True):
        x = nn.Dense(16, name="first")(x)
        x = nn.BatchNorm(use_running_average=use_running_average, name="norm")(x)
        return {"features": nn.relu(nn.Dense(16, name="second")(x))}


class Pull(Loss):
    """Half the squared norm of the parameters: a loss without a forward."""

    def mode(self):
        return None

    def value(self, model, outputs, batch, key):
        return 0.5 * tree.vdot(model.params, model.params), {}


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(1))
    return {"x": jax.random.normal(keys[0], (16, 8)), "label": jax.random.randint(keys[1], (16,), 0, 4)}


@pytest.fixture(scope="module")
def model(batch):
    net = linen(Net(), Net().init(jax.random.key(0), batch["x"]))
    return heads.classifier(net, 4, key=jax.random.key(2), on="features", width=16)


def rates(model, rules):
    return tree.assign(rules, model.params)


def run(step, model, batch, steps=3):
    state = step.init(model, jax.random.key(3))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def test_a_step_is_optax_on_the_plain_gradient(model, batch):
    optimizer = optax.adam(1e-2)
    state, metrics = run(make_step(Classify(), optimizer), model, batch, steps=1)

    def loss(params):
        logits = model.with_params(params)(batch)["logits"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1))

    value, gradient = jax.value_and_grad(loss)(model.params)
    updates, _ = optimizer.update(gradient, optimizer.init(model.params), model.params)
    chex.assert_trees_all_close(state.model.params, optax.apply_updates(model.params, updates), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert int(state.step) == 1


def test_frozen_leaves_are_bit_equal_without_gradient_or_optimiser_state(model, batch):
    step = make_step(Classify(), optax.adamw(1e-2), rates(model, [("head/.*", 1.0), (".*", 0.0)]))
    state, _ = run(step, model, batch, steps=5)
    for path, leaf in tree.flatten(state.model.params).items():
        same = bool((leaf == tree.flatten(model.params)[path]).all())
        assert same != path.startswith("head/"), path
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if jnp.ndim(leaf)]
    assert tree.size(moments) == 2 * tree.size(model.params["head"])


def test_a_rate_scales_the_update_and_a_schedule_can_hold_it(model, batch):
    late = lambda step: jnp.where(step < 2, 0.0, 1.0)  # noqa: E731
    rules = [("head/.*", 1.0), ("first/.*", 0.5), ("second/.*", late), (".*", 0.0)]
    step = make_step(Classify(), optax.sgd(0.1), rates(model, rules))
    full = make_step(Classify(), optax.sgd(0.1))
    once, plain = (run(s, model, batch, steps=1)[0].model.params for s in (step, full))
    before = model.params
    chex.assert_trees_all_close(once["head"], plain["head"], rtol=1e-6)
    chex.assert_trees_all_close(
        tree.sub(once["first"], before["first"]),
        tree.scale(0.5, tree.sub(plain["first"], before["first"])),
        atol=1e-7,
    )
    chex.assert_trees_all_equal(run(step, model, batch, steps=2)[0].model.params["second"], before["second"])
    assert (
        run(step, model, batch, steps=3)[0].model.params["second"]["kernel"] != before["second"]["kernel"]
    ).any()


def test_one_compilation_per_batch_shape(model, batch):
    traced = chex.assert_max_traces(n=2)(lambda model, batch, key: Classify()(model, batch, key))
    chex.clear_trace_counter()
    step = make_step(traced, optax.sgd(0.1))
    state = step.init(model, jax.random.key(0))
    half = jax.tree.map(lambda x: x[:8], batch)
    for _ in range(3):
        for piece in (batch, half):
            state, _ = step(state, piece)


def test_the_callers_model_survives_donation(model, batch):
    step = make_step(Classify(stats="batch"), optax.sgd(0.1))
    run(step, model, batch)
    jax.tree.map(np.asarray, model.variables)
    run(step, model, batch)


def test_batch_statistics_are_threaded(model, batch):
    state, _ = run(make_step(Classify(stats="batch"), optax.sgd(0.1)), model, batch)
    assert (state.collections["batch_stats"]["norm"]["mean"] != 0).all()
    kept, _ = run(make_step(Classify(), optax.sgd(0.1)), model, batch)
    chex.assert_trees_all_equal(kept.collections, {"batch_stats": model.variables["batch_stats"]})


def test_accumulation_equals_the_whole_batch(model, batch):
    whole, a = run(make_step(Classify(), optax.sgd(0.1)), model, batch)
    pieces, b = run(make_step(Classify(), optax.sgd(0.1), gradient=accumulate(4)), model, batch)
    chex.assert_trees_all_close(whole.model.params, pieces.model.params, atol=1e-6)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    counting = model.replace(variables={**model.variables, "state": {"count": jnp.int32(3)}})

    def counted(model, batch, key):
        value, aux = Classify()(model, batch, key)
        return value, Aux(aux.metrics, {"state": {"count": model.variables["state"]["count"] + 1}})

    state, _ = run(make_step(counted, optax.sgd(0.1), gradient=accumulate(4)), counting, batch)
    count = state.collections["state"]["count"]
    assert count == 6 and count.dtype == jnp.int32
    with pytest.raises(ValueError, match=r"accumulate\(3\): the batch has 16 rows"):
        run(make_step(Classify(), optax.sgd(0.1), gradient=accumulate(3)), model, batch)


def test_losses_add_over_one_forward(model, batch):
    forwards = []

    class Counted(Classify):
        def value(self, model, outputs, batch, key):
            forwards.append(id(outputs))
            return super().value(model, outputs, batch, key)

    loss = Counted() + 0.5 * (Counted(smoothing=0.1) + Pull())
    value, aux = loss(model, batch, jax.random.key(0))
    parts = [term(model, batch, None)[0] for term in (Classify(), Classify(smoothing=0.1), Pull())]
    np.testing.assert_allclose(value, parts[0] + 0.5 * (parts[1] + parts[2]), rtol=1e-6)
    assert len(set(forwards)) == 1 and set(aux.metrics) == {
        "loss", "Counted", "Counted_2", "Pull", "accuracy", "accuracy_2",
    }  # fmt: skip
    with pytest.raises(ValueError, match="share one forward but ask for different ones"):
        (Classify() + Classify(stats="batch"))(model, batch, None)
    with pytest.raises(TypeError, match="unsupported operand"):
        Classify() + (lambda model, batch, key: 0.0)


def test_a_losses_leaves_are_arguments_not_constants(model, batch):
    class Anchored(Loss):
        anchor: jax.Array

        def value(self, model, outputs, batch, key):
            return jnp.sum(outputs["logits"] * self.anchor), {}

    step = make_step(Anchored(jnp.arange(400_000.0).reshape(16, 25_000)[:, :4]), optax.sgd(0.1))
    text = step.lower(model, batch).as_text()
    assert "dense<" not in "".join(line for line in text.splitlines() if "16x4xf32" in line)


def test_your_own_loss_function(model, batch):
    def loss(model, batch, key):
        return jnp.mean(model(batch)["logits"] ** 2), Aux({}, {})

    _, metrics = run(make_step(loss, optax.sgd(0.01)), model, batch)
    assert float(metrics["loss"]) < float(loss(model, batch, None)[0])


def test_label_errors(model, batch):
    with pytest.raises(ValueError, match="nothing trains"):
        make_step(Classify(), optax.sgd(0.1), rates(model, [(".*", 0.0)])).init(model, jax.random.key(0))
    labels = jax.tree.map(lambda _: 1.0, {**model.params, "head": {"out": {"kernel": 0}}})
    with pytest.raises(ValueError, match=r"labels and params differ at \['head/out/bias'\]"):
        make_step(Classify(), optax.sgd(0.1), labels).init(model, jax.random.key(0))


@pytest.mark.parametrize("gradient", [None, accumulate(2)], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    "rules", [sharding.REPLICATED, sharding.FULLY_SHARDED, (("head/.*", sharding.REPLICATE), (".*", "shard"))]
)
def test_eight_devices_compute_what_one_does(model, batch, rules, gradient):
    options = {} if gradient is None else {"gradient": gradient}
    labels = rates(model, [("first/.*", 0.0), (".*", 1.0)])
    loss = Classify(stats="batch") if gradient is None else Classify()
    one, a = run(make_step(loss, optax.adam(1e-2), labels, **options), model, batch)
    devices = sharding.make_mesh()
    assert devices.size == 8
    step = make_step(loss, optax.adam(1e-2), labels, mesh=devices, sharding=rules, **options)
    many, b = run(step, model, sharding.global_batch(batch, devices))
    chex.assert_trees_all_close(one.model.variables, many.model.variables, atol=1e-5)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    if rules is sharding.FULLY_SHARDED:
        second = many.trained["second"]["kernel"]
        assert second.addressable_shards[0].data.size == second.size // 8
        moment = many.opt_state[0].mu["second"]["kernel"]
        assert moment.sharding == second.sharding


def test_a_losses_leaves_reach_a_mesh_wherever_they_were(model, batch):
    class Near(Loss):
        anchor: dict

        def mode(self):
            return None

        def value(self, model, outputs, batch, key):
            moved = tree.sub(model.params, self.anchor)
            return tree.vdot(moved, moved), {}

    devices = sharding.make_mesh()
    loss = Classify() + 0.5 * Near(jax.device_put(tree.scale(0.5, model.params), jax.devices()[0]))
    one, _ = run(make_step(loss, optax.sgd(0.1)), model, batch)
    step = make_step(loss, optax.sgd(0.1), mesh=devices)
    step.lower(model, batch)
    many, _ = run(step, model, sharding.global_batch(batch, devices))
    chex.assert_trees_all_close(one.model.params, many.model.params, atol=1e-5)


def test_a_mesh_rule_that_meets_nothing_raises(model):
    step = make_step(
        Classify(),
        optax.sgd(0.1),
        mesh=sharding.make_mesh(),
        sharding=[("encoder/.*", "shard"), (".*", "shard")],
    )
    with pytest.raises(tree.RuleError, match="encoder"):
        step.init(model, jax.random.key(0))


def test_compiler_options_reach_the_compiler(model, batch):
    """On a CPU a step with frozen leaves has options that hold less memory, and computes the same."""
    labels = finetune.freeze(model, "first/.*")
    lean = make_step(Classify(), optax.sgd(0.1), labels)
    plain = make_step(Classify(), optax.sgd(0.1), labels, compiler_options={})
    assert lean.compiler_options and not plain.compiler_options
    assert not make_step(Classify(), optax.sgd(0.1)).compiler_options
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(same, run(lean, model, batch)[0].trained, run(plain, model, batch)[0].trained)
    wrong = make_step(Classify(), optax.sgd(0.1), compiler_options={"no_such_option": True})
    with pytest.raises(Exception, match="no_such_option"):
        run(wrong, model, batch)


def test_a_step_takes_other_leaves_of_its_loss_without_compiling_again(model, batch):
    class Towards(Loss):
        """Half the squared distance to an anchor."""

        anchor: dict

        def mode(self):
            return None

        def value(self, model, outputs, batch, key):
            gap = tree.sub(model.params, self.anchor)
            return 0.5 * tree.vdot(gap, gap), {}

    near, far = (jax.tree.map(lambda x, by=by: x + by, model.params) for by in (0.0, 2.0))
    step = make_step(Towards(near), optax.sgd(1.0))
    step._compiled = jax.jit(chex.assert_max_traces(step.update, n=1), donate_argnums=0)
    for anchor in (near, far):
        state, _ = run(step.with_loss(Towards(anchor)), model, batch, steps=1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.model.params, anchor)
    with pytest.raises(ValueError, match="a jtl loss of this step's own structure, Towards"):
        step.with_loss(Pull())
    with pytest.raises(ValueError, match="make another step"):
        make_step(lambda model, batch, key: (0.0, Aux({}, {})), optax.sgd(1.0)).with_loss(Pull())
