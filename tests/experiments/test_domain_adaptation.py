"""Domain adaptation: how a model is chosen without target labels, and every method for real."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments.domain_adaptation import methods as methods
from experiments.domain_adaptation import training
from experiments.domain_adaptation.config import DomainAdaptation
from experiments.domain_adaptation.methods import METHODS, NAMES, ONLY_BATCH_NORM
from experiments.domain_adaptation.study import _summary_key, run
from experiments.domain_adaptation.training import RULES
from jtl import data, heads
from jtl.data import Arrays
from jtl.model import linen
from jtl.models.conv4 import Conv4
from jtl.train import make_step


def test_every_name_of_the_command_line_is_a_method():
    assert {*METHODS, *ONLY_BATCH_NORM} == set(NAMES)


def said(logits, label):
    logits, label = np.asarray(logits, np.float32), np.asarray(label)
    return {"logits": logits, "label": label, "features": logits}


def test_no_rule_but_the_oracle_reads_target_labels():
    rng = np.random.default_rng(0)
    source = said(rng.normal(size=(40, 3)), rng.integers(0, 3, 40))
    logits = rng.normal(size=(30, 3))
    found = [
        training.scores(source, said(logits, label), 5) for label in (np.zeros(30, int), np.ones(30, int))
    ]
    assert set(found[0]) == set(RULES)
    assert {rule for rule in RULES if found[0][rule] != found[1][rule]} == {"oracle"}


def test_changed_batches_are_those_of_the_step():
    batches = methods.Changed([{"x": 1}, {"x": 2}], lambda batch, step: {"x": batch["x"] + 10 * step})
    assert list(batches) == [{"x": 1}, {"x": 12}] and len(batches) == 2


def test_strong_views_differ_by_draw_and_stay_in_range():
    image = np.linspace(-1, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    one, again, other = (methods.strong_view(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert one.shape == image.shape and np.abs(one).max() <= 1 and np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "mnist5k"}, "--source and --target go together"),
        (
            {"source": "mnist5k", "target": "rotten_tomatoes"},
            "mnist5k holds images, --target rotten_tomatoes texts",
        ),
        ({"source": "newsgroups20:comp_sci:source", "target": "newsgroups20:rec_sci:target"}, "same classes"),
        ({"frozen": True}, "--frozen needs a pretrained --model"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"steps": 5}, "--validations 10 is over --steps 5"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(DomainAdaptation(out=tmp_path, **flags))


@pytest.fixture(scope="module")
def trial():
    rng = np.random.default_rng(0)
    module = Conv4(8)
    body = linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 16, 16, 3))))
    model = heads.classifier(body, 4, key=jax.random.key(1), on="features", width=8)
    train = {
        name: Arrays(
            {
                "image": rng.uniform(-1, 1, (32, 16, 16, 3)).astype(np.float32),
                "label": np.arange(32, dtype=np.int32) % 4,
            }
        )
        for name in ("source", "target")
    }
    return methods.Trial(model, train, 4, 6, 8, "batch", 8, 0, None, lambda: model)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_but_the_bound_sees_target_labels(trial, method):
    recipe = METHODS[method](trial)
    for batch in list(recipe.batches):
        target = batch["domain"] == 1 if "domain" in batch else np.full(8, method == "shot")
        if method != "target_trained":
            assert (batch["label"][target] == -1).all()
    assert ("pseudo_label" in batch) == (method == "shot")


def test_batches_hold_no_pairs_of_one_place_in_both_domains(trial):
    """MNIST-M is MNIST on photographs, in the same order: pairs would align the domains for every method."""
    for batch in list(trial.both()):
        source, target = batch["index"].reshape(2, -1)
        assert (source == target).mean() < 0.5 and set(source) != set(target)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_step_compiles_for_a_tpu_slice(trial, slice_2x2, method):
    recipe = METHODS[method](trial)
    step = make_step(recipe.loss, optax.adam(1e-3), recipe.labels, mesh=slice_2x2)
    lowered = step.lower(recipe.model, recipe.batches[0])
    assert lowered.compile().cost_analysis()["flops"] > 0


@pytest.mark.slow
def test_a_method_of_every_kind_on_images(tmp_path):
    kinds = ("source_only", "target_trained", "dann", "shot", "fixmatch", "adabn")
    config = DomainAdaptation(out=tmp_path, quick=True, method=kinds)
    result = run(config)
    assert list(result.summary["accuracy_mnist_m"]) == list(kinds)
    assert set(result.summary) == {_summary_key("mnist_m", rule) for rule in RULES}
    rows = {row["arm"]: row for row in result.rows}
    # What has target labels chooses by them, whatever the rule; the others end where the run ends.
    assert len({rows["target_trained"][training.key_of(rule)] for rule in RULES}) == 1
    assert all(row["step_last"] == 30 for arm, row in rows.items() if arm != "target_trained")
    # Where one model is all there is to choose from, as of adabn, the rules agree.
    assert len({rows["adabn"][training.key_of(rule)] for rule in RULES}) == 1
    again = run(replace(config, resume=True))
    assert again.rows == result.rows
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == json.loads(
        json.dumps(result.summary)
    )


@pytest.mark.slow
def test_texts_on_frozen_features(tmp_path):
    config = DomainAdaptation(out=tmp_path, quick=True, task=("newsgroups",), method=("dann", "mcc"))
    accuracy = run(config).summary["accuracy_newsgroups"]
    assert accuracy["target_trained"]["mean"] > 0.8
    with pytest.raises(ValueError, match="fixmatch need images"):
        run(DomainAdaptation(out=tmp_path / "no", quick=True, task=("newsgroups",), method=("fixmatch",)))


@pytest.mark.slow
def test_folders_of_images_are_domains(tmp_path):
    """Two small folders of real digits: handwritten ones of scikit-learn, and printed ones."""
    for name in ("uci_digits", "rendered_digits"):
        train = data.load(name).splits["train"]
        for i in range(100):
            folder = tmp_path / name / f"digit_{train[i]['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(train[i]["image"].squeeze()).save(folder / f"{i}.png")
    own = {
        name: str(tmp_path / folder)
        for name, folder in (("source", "uci_digits"), ("target", "rendered_digits"))
    }
    config = DomainAdaptation(out=tmp_path / "out", quick=True, method=("coral",), steps=6, validations=2,
                              batch_size=4, **own)  # fmt: skip
    result = run(config)
    assert list(result.summary["accuracy_own"]) == ["source_only", "target_trained", "coral"]
    assert len(list((tmp_path / "out").glob("*.png"))) > 2
