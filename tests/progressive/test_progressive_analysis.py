"""Sensitivities against per-example references, transfer measures by hand, and pruning against α = 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from progressive_models import MODELS, WHERE, batch_of, mlp, stirred

from jtl import progressive, tree

answer = jax.jit(lambda model, batch: model(batch)["logits"])


def hidden_and_logits(params, x, shift):
    """Three MLP columns written out; ``shift`` is added to h_1 and h_2 of each: {(column, layer): array}."""
    hidden = []
    for number, name in enumerate((None, "column_2", "column_3"), 1):
        p = params if name is None else params[name]
        h = jax.nn.relu(x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]) + shift.get((number, 0), 0.0)
        inputs = [h]
        for place, (layer, block) in enumerate(((p["dense_1"], "dense_1"), (p["head"]["out"], "head"))):
            z = inputs[place] @ layer["kernel"] + layer["bias"]
            if name:
                own = p["lateral"][block]
                read = jnp.concatenate(
                    [a * old[place] for a, old in zip(own["alpha"], hidden, strict=True)], -1
                )
                z = z + jax.nn.relu(read @ own["v"]) @ own["u"]
            inputs.append(z if block == "head" else jax.nn.relu(z) + shift.get((number, 1), 0.0))
        hidden.append(inputs)
    return hidden, hidden[-1][-1]


@pytest.mark.slow
def test_fisher_sensitivity_is_that_of_single_examples(three):
    batch = batch_of("mlp", 6)
    weight = np.array([1, 1, 1, 0, 1, 1], np.float32)
    found = progressive.fisher_sensitivity(three, [{**batch, "weight": weight}])
    rows = batch["x"][weight > 0]
    hidden, _ = jax.vmap(lambda row: hidden_and_logits(three.params, row, {}))(rows)
    gradient = jax.jit(jax.jacobian(
        lambda shift, row: jax.nn.log_softmax(hidden_and_logits(three.params, row, shift)[1])
    ))  # fmt: skip
    for place, block in enumerate(("dense_1", "head")):
        total = []
        for number in (1, 2, 3):
            own = np.asarray(hidden[number - 1][place])
            fisher = np.zeros(own.shape[-1])
            for row in rows:
                p = np.asarray(jax.nn.softmax(hidden_and_logits(three.params, row, {})[1]))
                g = np.asarray(gradient({(number, place): jnp.zeros(own.shape[-1])}, row)[(number, place)])
                fisher += (p[:, None] * g**2).sum(0) / len(rows)
            total.append((own.var(0) * fisher).sum())
        np.testing.assert_allclose(found[block], np.array(total) / sum(total), rtol=1e-4)


def test_fisher_sensitivity_does_not_depend_on_the_cut_into_batches(three):
    batch = batch_of("mlp", 8)
    whole = progressive.fisher_sensitivity(three, [batch])
    parts = [{name: x[i : i + 4] for name, x in batch.items()} for i in (0, 4)]
    for block, shares in progressive.fisher_sensitivity(three, parts).items():
        np.testing.assert_allclose(shares, whole[block], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv4", "bert"])
def test_a_fresh_column_relies_on_itself_and_a_stirred_one_does_not(kind):
    batch = batch_of(kind, 4)
    model = MODELS[kind](jax.random.key(0))
    model = progressive.grow(model, where=WHERE[kind], batch=batch, key=jax.random.key(1))
    for shares in progressive.fisher_sensitivity(model, [batch]).values():
        np.testing.assert_allclose(shares, [0, 1], atol=1e-6)
    for shares in progressive.fisher_sensitivity(stirred(model), [batch]).values():
        assert 0 < shares[0] < 1 and np.isclose(shares.sum(), 1)


def test_padding_tokens_are_no_activations():
    batch = batch_of("bert", 4)
    model = MODELS["bert"](jax.random.key(0))
    model = stirred(progressive.grow(model, where=WHERE["bert"], batch=batch, key=jax.random.key(1)))
    other = {**batch, "input_ids": np.where(batch["attention_mask"] > 0, batch["input_ids"], 3)}
    one, two = (progressive.fisher_sensitivity(model, [b])["encoder/layer_1"] for b in (batch, other))
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.fixture(scope="module")
def pair():
    """Two columns, labels that the model names itself, and one column's part of the outputs in its place."""
    batch = batch_of("mlp", 60)
    model = progressive.grow(
        mlp(jax.random.key(0)), where=WHERE["mlp"], batch=batch, key=jax.random.key(1), alpha=1.0
    )

    def only_from(number):
        flat = tree.flatten(stirred(model, "column_2/lateral/head/u").params)
        silent = "column_2/head/out/kernel" if number == 1 else "column_2/lateral/head/u"
        flat[silent] = jnp.zeros_like(flat[silent])
        logits = answer(model.with_params(tree.nest(flat)), batch)
        flat["column_2/head/out/bias"] = -logits.mean(0)  # all classes occur
        one = model.with_params(tree.nest(flat))
        return one, {**batch, "label": np.asarray(answer(one, batch)).argmax(-1)}

    return only_from


@pytest.mark.parametrize("number", [1, 2])
def test_sensitivities_find_the_only_column_that_matters(pair, number):
    model, batch = pair(number)
    expected = np.eye(2)[number - 1]
    aps = progressive.perturbation_sensitivity(model, [batch], key=jax.random.key(0))["head"]
    np.testing.assert_array_equal(aps, expected)
    np.testing.assert_allclose(progressive.fisher_sensitivity(model, [batch])["head"], expected, atol=1e-6)


def test_perturbation_needs_something_to_halve(three):
    batch = batch_of("mlp", 9)
    wrong = (np.asarray(answer(three, batch)).argmax(-1) + 1) % 3
    with pytest.raises(ValueError, match="accuracy is 0.000, that of chance 0.333"):
        progressive.perturbation_sensitivity(three, [{**batch, "label": wrong}], key=jax.random.key(0))


@pytest.mark.parametrize("measure", [progressive.fisher_sensitivity])
def test_sensitivities_refuse_a_single_column(measure):
    with pytest.raises(ValueError, match="one column: grow it first"):
        measure(mlp(jax.random.key(0)), [batch_of("mlp")])


# --- transfer --------------------------------------------------------------------------------------

R = np.array([[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.6, 0.9, 0.7]])
B = np.array([0.1, 0.2, 0.1])


def test_measures_of_a_sequence_by_hand():
    assert progressive.average_accuracy(R) == pytest.approx((0.6 + 0.9 + 0.7) / 3)
    assert progressive.backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert progressive.forward_transfer(R, B) == pytest.approx(((0.3 - 0.2) + (0.4 - 0.1)) / 2)
    nan = np.nan
    np.testing.assert_allclose(
        progressive.backward_matrix(R), [[nan, nan, nan], [-0.2, nan, nan], [-0.3, 0.1, nan]], atol=1e-12
    )
    np.testing.assert_allclose(
        progressive.forward_matrix(R, B), [[nan, 0.1, 0.1], [nan, nan, 0.3], [nan, nan, nan]], atol=1e-12
    )


def test_the_transfer_score_is_a_ratio_of_areas():
    steps = [0, 10, 30]
    assert progressive.area(steps, [0.0, 0.5, 0.7]) == pytest.approx((2.5 + 12) / 30)
    score = progressive.transfer_score(steps, [0.4, 0.8, 0.8], [0.2, 0.6, 0.8], chance=0.1)
    assert score == pytest.approx(((6 + 16) / 30 - 0.1) / ((4 + 14) / 30 - 0.1))
    with pytest.raises(ValueError, match="two points or more"):
        progressive.area([0, 0], [1, 1])
    with pytest.raises(ValueError, match=r"square matrix .* shape \(1, 1\)"):
        progressive.average_accuracy(np.ones((1, 1)))


# --- pruning ---------------------------------------------------------------------------------------


def without(model, block, sources, leaf="alpha"):
    """The model with these sources of the last column's lateral silenced."""
    path = f"column_3/lateral/{block}/{leaf}"
    flat = tree.flatten(model.params)
    values = flat[path].at[jnp.array(sources)].set(0)
    return model.with_params(tree.nest({**flat, path: values}))


def test_pruned_sources_are_those_with_alpha_0(three):
    batch = batch_of("mlp")
    shares = {"dense_1": np.array([0.005, 0.4, 0.595]), "head": np.array([0.001, 0.002, 0.997])}
    pruned = progressive.prune(three, shares)
    silenced = without(without(three, "dense_1", [0]), "head", [0, 1])
    np.testing.assert_allclose(answer(pruned, batch), answer(silenced, batch), atol=1e-6)
    own = pruned.params["column_3"]["lateral"]
    assert set(own) == {"dense_1"} and own["dense_1"]["v"].shape == (9, 7)
    np.testing.assert_array_equal(
        own["dense_1"]["v"], three.params["column_3"]["lateral"]["dense_1"]["v"][7:]
    )
    assert pruned.techniques[-1].needed() == {1, 2, 3}  # column 2 reads column 1
    np.testing.assert_array_equal(
        answer(progressive.task(pruned, 2), batch), answer(progressive.task(three, 2), batch)
    )


def test_columns_that_nothing_reads_do_not_run(three):
    none = {block: np.array([0.0, 0.0, 1.0]) for block in ("dense_1", "head")}
    pruned = progressive.prune(three, none)
    assert pruned.techniques[-1].needed() == {3}
    batch = batch_of("mlp")
    np.testing.assert_array_equal(answer(pruned, batch), answer(progressive.single_column(three, 3), batch))
    with pytest.raises(ValueError, match="sensitivity of block 'dense_1' to 3 columns is needed"):
        progressive.prune(three, {"head": np.ones(3)})
    with pytest.raises(ValueError, match="grow it first"):
        progressive.prune(progressive.task(three, 1), none)


def test_linear_laterals_of_convolutions_lose_the_rows_of_a_source():
    batch = batch_of("conv4", 4)
    model = MODELS["conv4"](jax.random.key(0))
    for k in (1, 2):
        model = progressive.grow(
            model, where="conv_[01]", batch=batch, key=jax.random.key(k), laterals="linear"
        )
    model = stirred(model)
    pruned = progressive.prune(model, {"conv_1": np.array([0.0, 0.5, 0.5])})
    u = model.params["column_3"]["lateral"]["conv_1"]["u"]
    assert u.shape == (3, 3, 8, 4) and pruned.params["column_3"]["lateral"]["conv_1"]["u"].shape == (
        3,
        3,
        4,
        4,
    )
    path = "column_3/lateral/conv_1/u"
    silenced = model.with_params(tree.nest({**tree.flatten(model.params), path: u.at[:, :, :4].set(0)}))
    np.testing.assert_allclose(answer(pruned, batch), answer(silenced, batch), atol=1e-5)
