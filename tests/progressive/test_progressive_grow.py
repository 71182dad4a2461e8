"""Growing: nothing changes at first, nothing earlier ever changes, and the equations are the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from progressive_models import MODELS, WHERE, C, batch_of, mlp, stirred

from jtl import heads, progressive, sharding, tree
from jtl.model import cast, linen
from jtl.models.conv4 import Conv4
from jtl.models.mlp import MLP
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

answer = jax.jit(lambda model, batch: model(batch)["logits"])


def grown(kind, number=2, **options):
    model = MODELS[kind](jax.random.key(0))
    for k in range(2, number + 1):
        model = progressive.grow(
            model, where=WHERE[kind], batch=batch_of(kind), key=jax.random.key(k), **options
        )
    return model


@pytest.mark.parametrize("laterals", ["nonlinear", "linear", "off"])
def test_a_new_column_computes_what_it_would_alone(kind, laterals):
    if kind != "mlp" and laterals == "off":
        return
    model, batch = grown(kind, laterals=laterals), batch_of(kind)
    np.testing.assert_array_equal(answer(model, batch), answer(progressive.single_column(model, 2), batch))
    assert (answer(model, batch) != answer(progressive.task(model, 1), batch)).any()
    if laterals != "off":
        assert (answer(stirred(model), batch) != answer(model, batch)).any()


@pytest.mark.slow
def test_earlier_tasks_stay_bit_identical_while_a_column_trains(kind):
    """Also with batch statistics: the frozen columns keep their running ones."""
    model, batch = stirred(grown(kind)), batch_of(kind)
    before = answer(progressive.task(model, 1), batch)
    first = progressive.task(model, 1)
    compiled = answer._cache_size()
    stats = "batch" if "batch_stats" in model.variables else "running"
    step = make_step(Classify(stats=stats), optax.adam(0.05), progressive.labels(model))
    state = step.init(model, jax.random.key(0))
    for seed in range(3):
        state, _ = step(state, batch_of(kind, seed=seed))
    trained = state.model
    assert step._compiled._cache_size() == 1
    np.testing.assert_array_equal(answer(progressive.task(trained, 1), batch), before)
    assert answer._cache_size() == compiled  # the same compiled call
    for path, leaf in tree.flatten(progressive.task(trained, 1).variables).items():
        np.testing.assert_array_equal(leaf, tree.flatten(first.variables)[path], err_msg=path)
    moved = tree.flatten(tree.sub(trained.params["column_2"], model.params["column_2"]))
    still = [path for path, leaf in moved.items() if not np.abs(leaf).max()]
    # Attention does not see a bias of its keys.
    assert [path for path in still if "key/bias" not in path and "pooler" not in path] == []
    if stats == "batch":
        old, new = (tree.flatten(m.variables["batch_stats"]["column_2"]) for m in (model, trained))
        assert all((old[path] != new[path]).any() for path in old)


def test_old_columns_have_no_optimiser_state(three):
    labels = progressive.labels(three)
    state = make_step(Classify(), optax.adam(1e-3), labels).init(three, jax.random.key(0))
    own = tree.size(three.params["column_3"])
    assert tree.size(state.opt_state[0].mu) == own < tree.size(three.params)
    assert set(tree.flatten(state.trained)) == {p for p in tree.flatten(three.params) if "column_3/" in p}


# --- the equations ---------------------------------------------------------------------------------


def relu(x):
    return np.maximum(x, 0)


def numpy_columns(params, x):
    """The logits of the last of three MLP columns, written out; and nothing of jtl's in it."""
    hidden = []  # of each column: h_1, h_2
    for name in (None, "column_2", "column_3"):
        p = params if name is None else params[name]
        h = relu(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"])
        inputs = [h]
        for place, (layer, block) in enumerate(((p["dense_1"], "dense_1"), (p["head"]["out"], "head"))):
            z = inputs[place] @ layer["kernel"] + layer["bias"]
            if name:
                own = p["lateral"][block]
                read = np.concatenate(
                    [a * old[place] for a, old in zip(own["alpha"], hidden, strict=True)], -1
                )
                z = z + relu(read @ own["v"]) @ own["u"]
            inputs.append(relu(z) if block == "dense_1" else z)
        hidden.append(inputs)
    return hidden[-1][-1]


def test_three_columns_are_the_equations_in_numpy(three):
    batch = batch_of("mlp")
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), three.params)
    np.testing.assert_allclose(answer(three, batch), numpy_columns(params, batch["x"]), atol=1e-5)


def test_gradients_are_those_of_the_numpy_network(three):
    """Central differences, in float64, of the cross-entropy; every leaf of the column and its laterals."""
    batch = batch_of("mlp")
    params = jax.tree.map(lambda leaf: np.array(leaf, np.float64), three.params)

    def loss():
        z = numpy_columns(params, batch["x"].astype(np.float64))
        z = z - z.max(-1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), batch["label"]]))

    found = jax.grad(lambda p: Classify()(three.with_params(p), batch, None)[0])(three.params)
    flat, rng = tree.flatten(params), np.random.default_rng(0)
    paths = [path for path in flat if path.startswith("column_3/")]
    assert {path.split("/")[-1] for path in paths} == {"kernel", "bias", "alpha", "u", "v"}
    for path in paths:
        for place in rng.integers(0, flat[path].size, 4):
            entry, kept = flat[path].reshape(-1), flat[path].reshape(-1)[place]
            entry[place] = kept + 1e-6
            up = loss()
            entry[place] = kept - 1e-6
            slope = (up - loss()) / 2e-6
            entry[place] = kept
            own = np.asarray(tree.flatten(found)[path]).reshape(-1)[place]
            np.testing.assert_allclose(own, slope, atol=2e-5, err_msg=path)


def test_linear_laterals_are_equation_1():
    model, batch = stirred(grown("mlp", laterals="linear")), batch_of("mlp")
    p = jax.tree.map(np.asarray, model.params)
    first, second = p, p["column_2"]
    h = [relu(batch["x"] @ q["dense_0"]["kernel"] + q["dense_0"]["bias"]) for q in (first, second)]
    g = relu(h[0] @ first["dense_1"]["kernel"] + first["dense_1"]["bias"])
    z = h[1] @ second["dense_1"]["kernel"] + second["dense_1"]["bias"]
    k = relu(z + h[0] @ second["lateral"]["dense_1"]["u"])
    out = second["head"]["out"]
    expected = k @ out["kernel"] + out["bias"] + g @ second["lateral"]["head"]["u"]
    np.testing.assert_allclose(answer(model, batch), expected, atol=1e-5)


def test_a_convolution_has_a_1x1_reduction_and_a_convolution_of_its_own_kind():
    model, batch = stirred(grown("conv4")), batch_of("conv4")
    own = model.params["column_2"]["lateral"]["conv_2"]
    assert own["v"].shape == (4, 4) and own["u"].shape == (3, 3, 4, 4)
    taps = model(batch, taps=("norm_1", "column_2/norm_1", "column_2/conv_2"))["taps"]
    pool = lambda x: np.maximum(x, 0).reshape(8, 4, 2, 4, 2, 4).max((2, 4))  # noqa: E731  relu and 2x2 pooling
    h, mine = pool(np.asarray(taps["norm_1"])), pool(np.asarray(taps["column_2/norm_1"]))
    read = relu(np.asarray(own["alpha"])[0] * h @ np.asarray(own["v"]))
    convolve = lambda x, w: np.asarray(  # noqa: E731
        jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    expected = convolve(mine, model.params["column_2"]["conv_2"]["kernel"]) + convolve(read, own["u"])
    # A tap is what the module itself gives; the lateral is added to it.
    plain = convolve(mine, model.params["column_2"]["conv_2"]["kernel"])
    after = np.asarray(model(batch, taps=("column_2/norm_2",))["taps"]["column_2/norm_2"])
    stats, norm = (
        jax.tree.map(np.asarray, model.variables[name]["column_2"]["norm_2"])
        for name in ("batch_stats", "params")
    )
    normed = (expected - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(after, normed, atol=1e-5)
    assert np.abs(plain - expected).max() > 1e-3


# --- growing further -------------------------------------------------------------------------------


def test_tasks_are_the_models_they_were(three):
    assert progressive.columns(three) == 3
    for number in (1, 2):
        one = progressive.task(three, number)
        assert progressive.columns(one) == number
        assert not [path for path in tree.flatten(one.params) if f"column_{number + 1}" in path]
    again = progressive.grow(progressive.task(three, 2), progressive.single_column(three, 3), where=WHERE["mlp"],
                             batch=batch_of("mlp"), key=jax.random.key(2))  # fmt: skip
    assert tree.diff(again.params, three.params) == [] and again.techniques == three.techniques


def test_no_lateral_into_the_first_block_and_one_from_every_earlier_column(three):
    paths = {path for path in tree.flatten(three.params) if "/lateral/" in path}
    assert paths == {
        f"column_{k}/lateral/{block}/{leaf}"
        for k in (2, 3)
        for block in ("dense_1", "head")
        for leaf in ("alpha", "u", "v")
    }
    own = three.params["column_3"]["lateral"]["dense_1"]
    assert own["alpha"].shape == (2,) and own["v"].shape == (7 + 9, 7) and own["u"].shape == (7, 6)


def test_columns_run_once_and_only_if_they_are_read(three):
    batch = batch_of("mlp")
    taps = ("dense_0", "column_2/dense_1", "column_3/head")
    assert set(three(batch, taps=taps)["taps"]) == set(taps)
    # Two products of each column, and V and U of its lateral between them; of the last its head with a lateral, too.
    text = jax.jit(lambda m, b: m(b)["logits"]).lower(three, batch).as_text()
    assert text.count("stablehlo.dot_general") == 2 + (2 + 2) + (3 + 4)
    off = progressive.grow(progressive.task(three, 2), where=WHERE["mlp"], batch=batch, key=jax.random.key(1),
                           laterals="off")  # fmt: skip
    text = jax.jit(lambda m, b: m(b)["logits"]).lower(off, batch).as_text()
    assert text.count("stablehlo.dot_general") == 3


def test_a_checkpoint_of_fewer_columns_goes_into_a_grown_model(three):
    batch = batch_of("mlp")
    two = progressive.task(three, 2)
    earlier = two.with_params(jax.tree.map(lambda leaf: leaf + 1, two.params))
    whole = progressive.replace_columns(three, earlier)
    np.testing.assert_array_equal(answer(progressive.task(whole, 2), batch), answer(earlier, batch))
    np.testing.assert_array_equal(
        whole.params["column_3"]["dense_0"]["kernel"], three.params["column_3"]["dense_0"]["kernel"]
    )
    other = mlp(jax.random.key(0), (7, 5))
    with pytest.raises(ValueError, match=r"first 1 columns differ from earlier's: ~ params/dense_1/bias"):
        progressive.replace_columns(three, other)
    with pytest.raises(ValueError, match="earlier has 3 columns, the model 2: grow it"):
        progressive.replace_columns(two, three)


def test_what_each_column_costs(three):
    batch = batch_of("mlp")
    rows = progressive.cost(three, batch)
    assert [row["column"] for row in rows] == [1, 2, 3]
    assert sum(row["parameters"] for row in rows) == tree.size(three.params)
    laterals = (0, 2 + 7 * 9 + 9 * 4 + 6 * 4 + 4 * 3, 4 + 16 * 7 + 7 * 6 + 10 * 6 + 6 * 3)
    assert tuple(row["lateral_parameters"] for row in rows) == laterals
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]


def test_a_step_costs_the_forward_of_the_old_columns_and_one_columns_step():
    """In FLOPs that XLA counts, at widths where products dominate. A product costs 2·B·size forward and twice that
    backward; V and the first layer need no gradient of their inputs."""
    model, rows = mlp(jax.random.key(0), (64, 64)), 64
    batch = batch_of("mlp", rows)
    for k in (2, 3):
        model = progressive.grow(model, where=WHERE["mlp"], batch=batch, key=jax.random.key(k))

    def flops(model, labels=None):
        lowered = make_step(Classify(), optax.sgd(0.1), labels).lower(model, batch)
        return lowered.compile().cost_analysis()["flops"]

    earlier = jax.jit(lambda m, b: m(b)["logits"]).lower(progressive.task(model, 2), batch).compile()
    own = model.params["column_3"]["lateral"]
    read = sum(2 * leaf["v"].size + 3 * leaf["u"].size for leaf in own.values()) * 2 * rows
    alone = flops(progressive.single_column(model, 3))
    total = flops(model, progressive.labels(model))
    assert total <= 1.1 * (earlier.cost_analysis()["flops"] + alone + read)


# --- with other parts ------------------------------------------------------------------------------


def test_a_column_in_bfloat16_and_a_second_round():
    model, batch = stirred(grown("mlp")), batch_of("mlp")
    low = cast(model, jnp.bfloat16)
    np.testing.assert_allclose(answer(low, batch), answer(model, batch), atol=0.1)
    again = progressive.grow(low, where=WHERE["mlp"], batch=batch, key=jax.random.key(4))
    assert progressive.columns(again) == 3 and again.techniques[-1] == low.techniques[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules", [sharding.REPLICATED, sharding.FULLY_SHARDED], ids=["replicated", "sharded"]
)
def test_eight_devices_grow_what_one_does(rules):
    model, batch, devices = stirred(grown("bert")), batch_of("bert"), sharding.make_mesh()
    trained = []
    for options in ({}, {"mesh": devices, "sharding": rules}):
        step = make_step(Classify(), optax.sgd(1.0), progressive.labels(model), **options)
        state = step.init(model, jax.random.key(0))
        for _ in range(2):
            state, _ = step(state, sharding.global_batch(batch, devices if options else None))
        trained.append(state.model.params)
    one, many = trained
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)
    moved = tree.flatten(tree.sub(one["column_2"], model.params["column_2"]))
    assert np.abs(moved["lateral/head/u"]).max() > 1e-3
    if rules is sharding.FULLY_SHARDED:
        wide = many["column_2"]["encoder"]["layer_0"]["attention"]["query"]["kernel"]
        assert wide.addressable_shards[0].data.size == wide.size // 8


def test_a_plain_function_can_be_a_column_without_laterals():
    net = function(lambda params, x: {"logits": x @ params["w"]}, {"w": jnp.ones((5, C))})
    batch = batch_of("mlp")
    grown_ = progressive.grow(
        net, mlp(jax.random.key(1)), where="", batch=batch, key=jax.random.key(0), laterals="off"
    )
    np.testing.assert_array_equal(answer(progressive.task(grown_, 1), batch), answer(net, batch))


# --- errors ----------------------------------------------------------------------------------------


def grow(model, column=None, where=WHERE["mlp"], **options):
    return progressive.grow(
        model, column, where=where, batch=batch_of("mlp"), key=jax.random.key(0), **options
    )


def test_growing_refuses():
    model = mlp(jax.random.key(0))
    headless = linen(MLP((7, 6)), {"params": {n: model.params[n] for n in ("dense_0", "dense_1")}})
    with pytest.raises(ValueError, match=r"column 1 has no head: it gives \['features'\] alone; attach one"):
        grow(headless)
    with pytest.raises(ValueError, match="column 2 has no head"):
        grow(model, headless)
    with pytest.raises(
        tree.RuleError, match=r"meets the blocks \['dense_1'\] of the new column: .* two or more"
    ):
        grow(model, where="dense_1")
    with pytest.raises(ValueError, match="column 1 has no block 'dense_2'.*near misses: .*dense_1"):
        grow(model, mlp(jax.random.key(1), (7, 6, 5)))
    with pytest.raises(ValueError, match="the last column wraps Function, so it cannot be drawn anew"):
        grow(function(lambda params, x: {"logits": x @ params["w"]}, {"w": jnp.ones((5, C))}))
    with pytest.raises(ValueError, match="no column for task 2: the model has 1"):
        progressive.task(model, 2)


def test_blocks_over_other_positions_are_named():
    batch = batch_of("conv4")

    class Strided(Conv4):
        def __call__(self, image, *, use_running_average=True):
            return super().__call__(jax.numpy.repeat(image, 2, 1), use_running_average=use_running_average)

    def model(cls):
        module = cls(4)
        body = linen(module, module.init(jax.random.key(0), jnp.asarray(batch["image"])))
        width = 4 if cls is Conv4 else 8
        return heads.classifier(body, C, key=jax.random.key(0), on="features", width=width)

    with pytest.raises(
        ValueError, match=r"block 'conv_1' takes \(8, 8, 8, 4\) in column 1 and \(8, 16, 8, 4\)"
    ):
        progressive.grow(model(Conv4), model(Strided), where="conv_.*", batch=batch, key=jax.random.key(0))
