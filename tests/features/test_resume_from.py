"""Resumed models against the full model, on a real configuration: MiniLM-L6's layers, with fewer words."""

import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import finetune, heads, tree
from jtl.features import fit_logistic, head_alone, resume_from, train_above
from jtl.model import Linen, Mode, Model, cast, linen
from jtl.models.bert import Bert, BertConfig
from jtl.models.parts.dropout import Dropout
from jtl.outputs import outputs
from jtl.tasks import Classify
from jtl.train import make_step

MINILM = {"vocab_size": 500, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "intermediate_size": 1536}  # fmt: skip
AT = "encoder/layer_3"
TOP = r"encoder/layer_[45]/.*|pooler/.*|head/.*"
B, L = 8, 16


def build(**changes) -> Model:
    config = BertConfig(**{**MINILM, **changes})
    variables = jax.jit(Bert(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return heads.classifier(
        Model(dict(variables), Linen(Bert(config)), config=config), 2, key=jax.random.key(1)
    )


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(L) < rng.integers(3, L + 1, B)[:, None]).astype(np.int32)
    return {"input_ids": rng.integers(0, 500, (B, L)).astype(np.int32), "attention_mask": mask,
            "label": np.arange(B, dtype=np.int32) % 2}  # fmt: skip


@pytest.fixture(scope="module")
def resumed_batch(model, batch):
    arrays = outputs(model, [batch], (AT, "label", "attention_mask", "input_ids"))
    return {**{name: arrays[name] for name in batch}, "resumed": arrays[AT]}


def value_and_gradient(model, batch, pattern, key=None, train=False):
    chosen, fixed = tree.partition(model.params, tree.matches(pattern, model.params))

    def loss(chosen):
        outputs = model.with_params(tree.combine(chosen, fixed))(batch, train=train, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs["logits"], batch["label"]
        ).mean(), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(chosen)


@pytest.mark.slow
def test_same_outputs_and_gradients_as_the_full_model(model, batch, resumed_batch):
    (_, full), full_gradient = value_and_gradient(model, batch, TOP)
    (_, short), short_gradient = value_and_gradient(resume_from(model, AT), resumed_batch, TOP)
    chex.assert_trees_all_close(short, full, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(short_gradient, full_gradient, rtol=1e-4, atol=1e-6)
    assert tree.norm(full_gradient["encoder"]["layer_4"]) > 1e-3


@pytest.mark.slow
def test_training_equals_the_full_model_with_a_frozen_deterministic_prefix(batch):
    """Ten Adam steps, dropout on above the cut: the reference runs every layer, without dropout up to the cut."""
    model = build(num_hidden_layers=3, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    arrays = outputs(model, [batch], ("encoder/layer_1", *batch))
    resumed_batch = {**{name: arrays[name] for name in batch}, "resumed": arrays["encoder/layer_1"]}
    resumed = resume_from(model, "encoder/layer_1")

    def no_dropout_below(call, args, kwargs, context):
        path = "/".join(context.module.path)
        below = path.startswith(("embeddings", "encoder/layer_0", "encoder/layer_1"))
        return args[0] if below and isinstance(context.module, Dropout) else call(*args, **kwargs)

    def reference(model, batch, key):
        with nn.intercept_methods(no_dropout_below):
            return Classify()(model, batch, key)

    pattern = r"encoder/layer_2/.*|pooler/.*|head/.*"
    finals = []
    for start, data, loss in (
        (model, batch, reference),
        (resumed, resumed_batch, Classify()),
        (model, batch, Classify()),
    ):
        step = make_step(loss, optax.adamw(1e-3, weight_decay=0.1), finetune.train_only(start, pattern))
        state = step.init(start, jax.random.key(5))
        for _ in range(10):
            state, _ = step(state, data)
        finals.append(state.model.params)
    chex.assert_trees_all_close(finals[1], finals[0], atol=2e-5)
    # Dropout below the cut makes another run: the cache stands for the deterministic prefix only.
    assert tree.norm(tree.sub(finals[2], finals[0])) > 100 * tree.norm(tree.sub(finals[1], finals[0]))
    below = tree.remove(pattern, model.params)
    chex.assert_trees_all_equal(tree.remove(pattern, finals[1]), below)


def flops(compiled) -> float:
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def step_flops(model, batch, labels) -> float:
    step = make_step(Classify(), optax.sgd(0.1), labels)
    return flops(step.lower(model, batch).compile())


@pytest.mark.slow
def test_the_prefix_costs_nothing(model, batch, resumed_batch):
    labels = finetune.train_only(model, TOP)
    full, short = step_flops(model, batch, labels), step_flops(resume_from(model, AT), resumed_batch, labels)
    prefix = flops(jax.jit(lambda m, b: m(b, taps=(AT,))["taps"][AT]).lower(model, batch).compile())
    print(f"step: full {full:.3e}, resumed {short:.3e}, prefix {prefix:.3e} FLOP")
    # Products alone: 4 layers forward of 6, with forward, and backward of 2.
    per_token = 2 * (4 * 384**2 + 2 * 384 * 1536) + 4 * L * 384
    np.testing.assert_allclose(prefix, 4 * B * L * per_token, rtol=0.1)
    np.testing.assert_allclose(short, full - prefix, rtol=0.05)
    assert short < 0.65 * full


@pytest.mark.slow
def test_mixed_precision_casts_the_activation(model, batch, resumed_batch):
    low = cast(model, jnp.bfloat16)(batch)["logits"]
    arrays = outputs(cast(model, jnp.bfloat16), [batch], (AT, "label"))
    short = resume_from(cast(model, jnp.bfloat16), AT)({**batch, "resumed": arrays[AT]})["logits"]
    np.testing.assert_allclose(short, low, atol=2e-2)


def test_above_labels_what_is_still_read(model, resumed_batch):
    labels = train_above(resume_from(model, AT), resumed_batch)
    chex.assert_trees_all_equal(labels, finetune.train_only(model, TOP))
    features = train_above(resume_from(model, AT), resumed_batch, output="features")
    chex.assert_trees_all_equal(features, finetune.train_only(model, r"encoder/layer_[45]/.*"))


class Blocks(nn.Module):
    """A small convolutional net with batch normalisation."""

    @nn.compact
    def __call__(self, image, *, train: bool = False, use_running_average: bool = True):
        for i in range(3):
            image = nn.relu(nn.Conv(4, (3, 3), 2, name=f"layer_{i}")(image))
            image = nn.BatchNorm(use_running_average=use_running_average, name=f"norm_{i}")(image)
        return {"map": image, "features": image.mean((1, 2))}


def test_absent_images_are_stood_in_for():
    images = {"image": np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)}
    model = linen(Blocks(), jax.jit(Blocks().init)(jax.random.key(0), images["image"]))
    arrays = outputs(model, [images], ("norm_1", "features"))
    resumed = resume_from(model, "norm_1", images)
    rows = {"resumed": arrays["norm_1"][:2]}
    np.testing.assert_allclose(resumed(rows)["features"], arrays["features"][:2], rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match=r"needs the batch fields \['image'\]"):
        resume_from(model, "norm_1")(rows)
    with pytest.raises(ValueError, match="stats='running'"):
        resumed(rows, stats="batch")


def test_a_mask_that_the_upper_layers_read_is_never_blank(model, batch, resumed_batch):
    """Zeros for an absent mask would hide every token, and the outputs would be wrong in silence."""
    resumed = resume_from(model, AT, batch)
    rows = {name: resumed_batch[name] for name in ("resumed", "attention_mask")}
    np.testing.assert_allclose(resumed(rows)["logits"], model(batch)["logits"], rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match=r"reads the batch fields \['attention_mask'\] too: keep them"):
        resumed({"resumed": resumed_batch["resumed"]})


def test_a_wrong_cut_is_named(model, batch, resumed_batch):
    with pytest.raises(KeyError, match="encoder/layer_1"):
        resume_from(model, "encoder/layer_11", batch)
    with pytest.raises(KeyError, match="near misses: .*encoder/layer_1"):
        jax.eval_shape(resume_from(model, "encoder/layer_11"), resumed_batch)
    with pytest.raises(KeyError, match=r"put its cached activation in batch\['resumed'\]"):
        resume_from(model, AT)(batch)
    with pytest.raises(KeyError, match="lie below"):
        jax.eval_shape(
            lambda b: resume_from(model, AT).run(b, Mode(taps=("encoder/layer_1",))), resumed_batch
        )


@pytest.mark.slow
def test_head_on_cached_features_is_20_times_cheaper(model, batch):
    """An epoch of a frozen backbone against one of the same head on cached features: FLOP and seconds."""
    wide = {name: np.tile(value, (2, 2)[: value.ndim]) for name, value in batch.items()}
    head = head_alone(model)
    cached = outputs(model, [wide], ("pooled", "label"))
    frozen = make_step(Classify(), optax.adam(1e-3), finetune.train_only(model, "head/.*"))
    alone = make_step(Classify(), optax.adam(1e-3))
    seconds = {}
    for name, step, start, data in (("frozen", frozen, model, wide), ("alone", alone, head, cached)):
        state, _ = step(step.init(start, jax.random.key(0)), data)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            state, metrics = step(state, data)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    flop_ratio = step_flops(model, wide, finetune.train_only(model, "head/.*")) / step_flops(
        head, cached, None
    )
    wall_ratio = seconds["frozen"] / seconds["alone"]
    print(f"frozen backbone / cached head: {flop_ratio:.0f} x FLOP, {wall_ratio:.0f} x seconds")
    assert flop_ratio > 20 and wall_ratio > 20


def test_a_head_trained_alone_fits_back(model, batch):
    head = head_alone(model)
    cached = outputs(model, [batch], ("pooled", "label"))
    np.testing.assert_allclose(head(cached)["logits"], model(batch)["logits"], rtol=1e-5, atol=1e-5)
    step = make_step(Classify(), optax.sgd(0.1))
    state = step.init(head, jax.random.key(0))
    state, _ = step(state, cached)
    whole = model.with_params({**model.params, **state.model.params})
    np.testing.assert_allclose(whole(batch)["logits"], state.model(cached)["logits"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no head 'other'"):
        head_alone(model, "other")


def test_lp_ft_starts_at_the_probe(model, batch):
    cached = outputs(model, [batch], (heads.find(model).on, "label"))
    probe = fit_logistic(cached["pooled"], cached["label"], penalties=(0.01,))
    started = finetune.put_head(model, **probe.as_head())
    np.testing.assert_allclose(started(batch)["logits"], probe(cached["pooled"]), atol=1e-3)
