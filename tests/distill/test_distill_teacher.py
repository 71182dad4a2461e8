"""A live teacher, cached columns, regressors and padding: what the losses read, what it costs, what is refused."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, distill, finetune, heads, measure, tree
from jtl import model as models
from jtl.loss import Sum
from jtl.model import Linen, Mode, Model, remove
from jtl.models.bert import Bert, BertConfig
from jtl.outputs import outputs
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

B, L, C = 4, 6, 3
LAYERS = ("encoder/layer_0", "encoder/layer_1")
# Before the norm, after which all tokens have one energy.
MLPS = ("encoder/layer_0/mlp", "encoder/layer_1/mlp")


def bert(width, layers, seed):
    config = BertConfig(
        vocab_size=30, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    variables = jax.jit(Bert(config).init)(jax.random.key(seed), jnp.zeros((1, L), jnp.int32))
    # Larger than at initialisation, so that nothing is nearly 0.
    variables = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim == 2 else leaf, dict(variables))
    return heads.classifier(
        Model(variables, Linen(Bert(config)), config=config), C, key=jax.random.key(seed + 1)
    )


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(2), (B, L), 0, 30)
    mask = jnp.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] * 6])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "label": jnp.arange(B) % C,
        "weight": jnp.array([1.0, 1, 1, 0]),
    }


@pytest.fixture(scope="module")
def teacher():
    return bert(24, 2, 0)


@pytest.fixture(scope="module")
def student(batch):
    return distill.regressor(bert(16, 2, 5), 24, on=LAYERS[1], batch=batch, key=jax.random.key(9))


SUM = (
    Classify()
    + 0.5 * distill.SoftTargets(2.0)
    + distill.Hint("hint", LAYERS[1])
    + distill.AttentionTransfer(MLPS, MLPS)
    + distill.Similarity()
)


@pytest.mark.slow
def test_live_and_cached_teachers_give_what_the_functions_give(student, teacher, batch):
    taps = jax.jit(lambda model, batch: model(batch, taps=(*LAYERS, *MLPS)))
    own, other = taps(student, batch), taps(teacher, batch)
    real = batch["weight"]
    tokens = batch["attention_mask"] * real[:, None]
    hidden = (
        own["taps"][LAYERS[1]] @ student.params["hint"]["kernel"] + student.params["hint"]["bias"][None, None]
    )
    padding = batch["attention_mask"][..., None]
    expected = {
        "SoftTargets": distill.soft_targets(own["logits"], other["logits"], 2.0, real),
        "Hint": distill.hint(hidden, other["taps"][LAYERS[1]], tokens),
        "AttentionTransfer": sum(
            distill.attention_transfer(own["taps"][at] * padding, other["taps"][at] * padding, real)
            for at in MLPS
        ),
        "Similarity": distill.similarity(own["features"], other["features"], real),
        "Classify": Classify()(student, batch, None)[0],
    }
    total = sum(value for value in expected.values()) - 0.5 * expected["SoftTargets"]
    # The cache keeps the rows of weight 1 alone, so the batch of it has three.
    names = ("logits", "features", LAYERS[1], *MLPS)
    cached = distill.columns(outputs(teacher, [batch], names))
    rows = jax.tree.map(lambda x: x[:3], batch) | cached
    assert set(cached) == {
        "teacher_logits",
        "teacher/features",
        *(f"teacher/{at}" for at in (LAYERS[1], *MLPS)),
    }
    run = jax.jit(lambda loss, model, batch: loss(model, batch, None))
    for loss, given in (
        (distill.Distill(teacher, SUM), batch),
        (Classify() + distill.Distill(teacher, Sum(SUM.terms[1:], SUM.weights[1:])), batch),
        (SUM, rows),
    ):
        value, aux = run(loss, student, given)
        np.testing.assert_allclose(value, total, rtol=1e-5)
        for name, part in expected.items():
            np.testing.assert_allclose(aux.metrics[name], part, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_content_of_padding_does_not_count(student, teacher, batch):
    run = jax.jit(lambda model, batch: distill.Distill(teacher, SUM)(model, batch, None)[0])
    other = {
        **batch,
        "input_ids": jnp.where(batch["attention_mask"] == 0, 7, batch["input_ids"]).at[3].set(1),
    }
    np.testing.assert_allclose(run(student, batch), run(student, other), rtol=1e-5)


@pytest.mark.slow
def test_no_gradient_reaches_the_teacher_and_a_low_precision_one_teaches(student, teacher, batch):
    loss = lambda teacher: distill.Distill(teacher, SUM)(student, batch, None)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(teacher)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    low = jax.jit(loss)(models.cast(teacher, jnp.bfloat16))
    assert low != value
    np.testing.assert_allclose(low, value, rtol=0.05)
    # Leaves stored in bfloat16 work too: half the memory.
    stored = teacher.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), teacher.params))
    np.testing.assert_allclose(jax.jit(loss)(stored), value, rtol=0.05)


@pytest.mark.slow
def test_a_composed_step_compiles_once_and_learns(teacher, batch):
    """Soft targets and hints into a LoRA'd student with layer-wise rates."""
    student = adapters.lora(bert(16, 2, 5), rank=2, where=".*/(query|value)", key=jax.random.key(3))
    student = distill.regressor(student, 24, on=LAYERS[1], batch=batch, key=jax.random.key(9))
    loss = distill.Distill(
        teacher,
        Classify() + 0.5 * distill.SoftTargets(4.0) + distill.Hint("hint", LAYERS[1], over_units="mean"),
    )
    traced = chex.assert_max_traces(n=1)(lambda model, batch, key: loss(model, batch, key))
    chex.clear_trace_counter()
    chosen = finetune.train_only(student, ".*/lora/.*|head/.*|hint/.*")
    rates = finetune.layerwise(student, decay=0.5)
    labels = jax.tree.map(lambda a, b: a * b, chosen, rates)
    assert {0.0, 0.25, 0.5, 1.0} == set(jax.tree.leaves(labels))
    step = make_step(traced, optax.adam(3e-3), labels)
    state = step.init(student, jax.random.key(0))
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    before, after = tree.flatten(student.params), tree.flatten(state.model.params)
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved and all("lora" in path or path.startswith(("head", "hint")) for path in moved)
    bare = remove(state.model, "hint")
    assert "hint" not in bare.params and len(bare.techniques) == len(student.techniques) - 1
    np.testing.assert_array_equal(*(jax.jit(lambda m: m(batch)["logits"])(m) for m in (bare, state.model)))


class Net(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = nn.relu(nn.Dense(self.width, name=f"layer_{i}")(x))
        return {"features": x, "logits": nn.Dense(C, name="out")(x)}


@pytest.mark.slow
def test_a_step_costs_its_parts():
    x = jnp.ones((64, 64))
    big, small = (
        models.linen(Net(width, depth), Net(width, depth).init(jax.random.key(0), x))
        for width, depth in ((256, 4), (128, 2))
    )
    batch = {"x": x, "label": jnp.zeros(64, jnp.int32)}
    cached = {**batch, "teacher_logits": jnp.ones((64, C)), "teacher/layer_1": jnp.ones((64, 256))}
    small = distill.regressor(small, 256, on="layer_0", batch=batch, key=jax.random.key(1))
    terms = Classify() + distill.SoftTargets() + distill.DIST() + distill.DKD()

    def flops(loss, batch):
        return make_step(loss, optax.sgd(0.1)).lower(small, batch).compile().cost_analysis()["flops"]

    alone = flops(Classify(), batch)
    forward = measure.forward(big, batch, runs=0).flops
    assert forward > 2 * 64 * (64 * 256 + 3 * 256**2)
    assert flops(distill.Distill(big, terms), batch) <= 1.05 * (forward + alone)
    assert flops(terms, cached) <= 1.05 * alone
    # Two terms that each bring the teacher pay for it twice: its leaves are other arguments to XLA.
    twice = distill.Distill(big, distill.SoftTargets()) + distill.Distill(big, distill.DIST())
    assert flops(twice, batch) > 1.9 * forward
    # A hint costs its regressor besides: forward, and two products backward.
    hint = flops(terms + distill.Hint("hint", "layer_1"), cached)
    assert hint - alone <= 1.05 * 3 * 2 * 64 * 128 * 256


def test_a_regressor_runs_when_it_is_asked_for_alone(student, batch):
    run = lambda *taps: student.run(batch, Mode(taps=taps))[0]  # noqa: E731
    assert "taps" not in jax.eval_shape(run)
    shape = jax.eval_shape(lambda: run("hint"))["taps"]["hint"].shape
    assert shape == (B, L, 24)
    assert measure.forward(student, batch, runs=0).flops == pytest.approx(
        measure.forward(remove(student, "hint"), batch, runs=0).flops
    )


def test_review_distils_every_level():
    class Conv(nn.Module):
        width: int

        @nn.compact
        def __call__(self, image):
            for i in range(2):
                image = nn.relu(nn.Conv(self.width * (i + 1), (3, 3), strides=2, name=f"stage_{i}")(image))
            return {"map": image, "features": image.mean((1, 2))}

    batch = {"image": jax.random.normal(jax.random.key(0), (3, 12, 12, 1)), "weight": jnp.array([1.0, 1, 0])}
    big, small = (
        models.linen(Conv(w), jax.jit(Conv(w).init)(jax.random.key(w), batch["image"])) for w in (4, 2)
    )
    stages = ("stage_0", "stage_1")
    review = distill.Review(((6, 6, 4), (3, 3, 8)), width=5)
    small = distill.regressor(small, review, on=stages, name="review", batch=batch, key=jax.random.key(1))
    loss = distill.Distill(big, distill.ReviewKD(stages))
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(small.with_params(p), batch, None)[0]))(
        small.params
    )
    fused, taught = (
        jax.jit(lambda m, t=t: m(batch, taps=t)["taps"])(m) for m, t in ((small, ("review",)), (big, stages))
    )
    expected = [
        distill.hierarchical_context(own, taught[name], batch["weight"])
        for own, name in zip(fused["review"], stages, strict=True)
    ]
    np.testing.assert_allclose(value, sum(expected), rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["review"]))

    # The deepest level reaches the shallowest loss, and not the other way round.
    def level(params, number):
        return jnp.sum(small.with_params(params)(batch, taps=("review",))["taps"]["review"][number])

    reach = [jax.jit(jax.grad(level), static_argnums=1)(small.params, n)["review"] for n in (0, 1)]
    assert np.any(reach[0]["narrow_1"]["kernel"]) and not np.any(reach[1]["narrow_0"]["kernel"])
    for shapes, message in (
        (((6, 6, 4),), "2 student levels, 1 teacher"),
        (((6, 6, 4), (6, 6, 8)), "level 1 of"),
    ):
        with pytest.raises(ValueError, match=message):
            bare = remove(small, "review")
            distill.regressor(bare, distill.Review(shapes), on=stages, batch=batch, key=jax.random.key(1))


def test_models_of_functions_name_their_outputs():
    def apply(params, x):
        return {"hidden": x @ params["w"], "logits": x}

    big, small = (function(apply, {"w": scale * jnp.ones((2, 3))}) for scale in (1.0, 2.0))
    loss = distill.Distill(big, distill.Hint("outputs/hidden", "outputs/hidden"))
    assert float(loss(small, {"x": jnp.ones((5, 2))}, None)[0]) == 0.5 * 3 * (4 - 2) ** 2


def test_what_is_missing_is_named(student, teacher, batch):
    shape = lambda loss, batch=batch: jax.eval_shape(lambda: loss(student, batch, None))  # noqa: E731
    for loss, message in (
        (distill.SoftTargets(), r"reads batch\['teacher_logits'\].*Distill\(teacher, SoftTargets"),
        (
            distill.Distill(teacher, distill.Hint("hint", "encoder/layer_2")),
            "no module at tap.*encoder/layer_1",
        ),
        (distill.Distill(teacher, distill.Hint("hnt", LAYERS[1])), "no module at tap 'hnt'"),
        (distill.Distill(teacher, distill.Hint("hint", "outputs/sequenc")), "gives no 'sequenc'.*'sequence'"),
        (distill.Distill(teacher, distill.Hint("map", "sequence")), "gives no 'map'"),
    ):
        with pytest.raises(KeyError, match=message):
            shape(loss)
    for loss, message in (
        (distill.Distill(teacher, Classify()), "no term of Classify reads a teacher"),
        (
            distill.Distill(teacher, distill.AttentionTransfer(LAYERS, LAYERS[:1])),
            "2 student layers, 1 teacher",
        ),
        (distill.Distill(teacher, distill.FSP(LAYERS[:1], LAYERS[:1])), "FSP takes two layers"),
        (
            distill.Distill(teacher, distill.Hint(LAYERS[1], LAYERS[1])),
            r"\(4, 6, 16\), the teacher \(4, 6, 24\)",
        ),
        (Classify() + distill.SoftTargets(stats="batch"), "share one forward"),
    ):
        with pytest.raises(ValueError, match=message):
            shape(loss)
    wrong = heads.classifier(teacher, C + 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"the student gives \(4, 3\), the teacher \(4, 4\)"):
        shape(distill.Distill(wrong, distill.SoftTargets()))
    with pytest.raises(KeyError, match="near misses.*encoder/layer_1"):
        distill.regressor(student, 24, on="encoder/layer_9", name="other", batch=batch, key=jax.random.key(0))
    with pytest.raises(ValueError, match="choose another name"):
        distill.regressor(student, 24, on=LAYERS[0], batch=batch, key=jax.random.key(0))
    with pytest.raises(ValueError, match="params alone"):
        norm = nn.BatchNorm(use_running_average=True)
        distill.regressor(student, norm, on=LAYERS[0], name="other", batch=batch, key=jax.random.key(0))
