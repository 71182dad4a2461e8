"""Distillation experiments: every method on small networks and for a TPU slice, and short real runs."""

import json
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks.distill import BenchDistill
from experiments.benchmarks.distill import run as bench_distill
from experiments.distill import students
from experiments.distill.config import Distillation
from experiments.distill.methods import METHODS, Method, Trial
from experiments.distill.study import run
from experiments.distill_lm import DistillLM
from experiments.distill_lm import run as distill_lm
from jtl import distill, heads
from jtl.data import Arrays
from jtl.model import linen
from jtl.models.conv4 import Conv4
from jtl.train import make_step

PAIRS = (("norm_2", "norm_2"), ("norm_3", "norm_3"))
LAYERS = students.Student("conv4", lambda *_: None, PAIRS, PAIRS[1], "batch", 1e-3)


def conv4(width, seed):
    module = Conv4(width)
    body = linen(module, jax.jit(module.init)(jax.random.key(seed), jnp.zeros((2, 32, 32, 3))))
    return heads.classifier(body, 4, key=jax.random.key(seed), on="features", width=4 * width)


@pytest.fixture(scope="module")
def trial():
    rng = np.random.default_rng(0)
    train = Arrays(
        {
            "image": rng.uniform(-1, 1, (32, 32, 32, 3)).astype(np.float32),
            "label": np.arange(32, dtype=np.int32) % 4,
        }
    )
    taught = distill.Taught(train, {"teacher_logits": rng.normal(size=(32, 4)).astype(np.float32)})
    return Trial(conv4(8, 0), conv4(4, 1), LAYERS, conv4(4, 2), train, taught, train, 4, 6, 8, (1,), seed=0)


def test_every_name_of_the_command_line_is_a_method():
    assert tuple(METHODS) == get_args(Method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m != "fsp"])  # its first layers are EfficientNet's
def test_every_method_ends_in_the_student_alone(trial, method):
    recipe = METHODS[method](trial)
    step = make_step(recipe.loss, optax.sgd(1e-2))
    state = step.init(jax.tree.map(jnp.copy, recipe.model), jax.random.key(0))
    for batch in list(recipe.batches)[:2]:
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    student = recipe.finish(state.model)
    assert jax.tree.structure(student.params) == jax.tree.structure(trial.student.params)
    assert student.techniques == trial.student.techniques and set(student.variables) == {
        "params",
        "batch_stats",
    }
    if method == "function_matching":
        assert "label" not in batch


def test_a_term_between_layers_begins_as_large_as_the_labels(trial):
    recipe = METHODS["similarity"](trial)
    compute = jax.jit(lambda loss, model, batch: loss(model, batch, jax.random.key(0)))
    loss, aux = compute(recipe.loss, recipe.model, trial.example)
    np.testing.assert_allclose(loss, 2 * aux.metrics["Classify"], rtol=1e-4)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["soft_targets", "hint", "rkd", "crd", "review_kd", "mutual", "ema_teacher"]
)
def test_steps_compile_for_a_tpu_slice(trial, slice_2x2, method):
    recipe = METHODS[method](trial)
    step = make_step(recipe.loss, optax.adam(1e-3), mesh=slice_2x2)
    assert step.lower(recipe.model, recipe.batches[0]).compile().cost_analysis()["flops"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "minilm"}, "--model, --data and --student go together"),
        (
            {"model": "minilm", "data": "rotten_tomatoes", "student": "layers_4"},
            "a divisor of their 6 layers",
        ),
        ({"model": "minilm", "data": "rotten_tomatoes", "student": "conv4"}, "image models conv4"),
        ({"setting": ("text",), "method": ("review_kd",)}, "--method review_kd: .* need images"),
        ({"setting": ("born_again",), "method": ("fsp",)}, "a student with layers like its teacher's"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Distillation(out=tmp_path, **flags))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["text_1_layer", "image"])
def test_a_short_real_run(setting, tmp_path):
    config = Distillation(out=tmp_path, quick=True, setting=(setting,), image_size=32)
    result = run(config)
    arms = ["teacher", "student_alone", "soft_targets", "hint"]
    assert list(result.summary[f"accuracy_{setting}"]) == arms
    assert result.summary[f"kept_{setting}"]["teacher"]["mean"] == 1
    assert result.summary["latency_ratio"][setting]["mean"] > 1
    pictures = {path.stem for path in tmp_path.glob("*.png") if path.stat().st_size > 5_000}
    assert f"{setting}_calibration" in pictures
    assert any(name.endswith("_accuracy_against_cost") for name in pictures)
    again = run(replace(config, resume=True))
    assert again.rows == result.rows
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == json.loads(
        json.dumps(result.summary)
    )


@pytest.mark.slow
def test_a_language_model(tmp_path):
    result = distill_lm(DistillLM(out=tmp_path, quick=True, arm=("top_k", "gkd")))
    perplexity = {arm: found["mean"] for arm, found in result.summary["perplexity_lm"].items()}
    assert list(perplexity) == ["teacher", "untrained", "student_alone", "top_k", "gkd"]
    assert perplexity["teacher"] < perplexity["student_alone"] < perplexity["untrained"]


def test_flags_of_a_language_model(tmp_path):
    with pytest.raises(ValueError, match="--prompt 40 must be below --max-length 32"):
        distill_lm(DistillLM(out=tmp_path, prompt=40))


@pytest.mark.slow
def test_bench_distill(tmp_path):
    result = bench_distill(BenchDistill(out=tmp_path, quick=True, batch_size=4, image_size=32, max_length=16))
    costs = {arm: found["mean"] for arm, found in result.summary["flops_over_minimum"].items()}
    assert set(costs) == {"text_soft_targets", "text_dkd", "image_soft_targets", "image_dkd"}
    assert max(costs.values()) <= 1.05
