"""Every experiment for real, on real weights and data, as short as ``--quick`` makes it."""

import json
from importlib import import_module

import jax
import numpy as np
import pytest

from experiments.common.settings import Config
from experiments.finetune import Finetune
from experiments.finetune import run as finetune
from jtl.pretrained import save, scratch

pytestmark = pytest.mark.slow
IMAGES = {"model": "efficientnet-lite0", "data": "uci_digits", "image_size": 32}


def figures(folder):
    return {path.stem for path in folder.glob("*.png") if path.stat().st_size > 5_000}


def test_finetune(tmp_path):
    result = finetune(Finetune(out=tmp_path, quick=True, save=True))
    accuracy = result.summary["accuracy"]
    assert list(accuracy) == ["majority", "probe", "full"]
    assert min(accuracy["full"]["mean"], accuracy["probe"]["mean"]) > accuracy["majority"]["mean"]
    assert {"learning_curves", "confusion", "features_before_and_after"} <= figures(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == json.loads(
        json.dumps(result.summary)
    )
    assert "Surest errors" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert any((tmp_path / "events").iterdir())
    with pytest.raises(FileExistsError, match="already holds a run"):
        finetune(Finetune(out=tmp_path, quick=True))
    again = finetune(Finetune(out=tmp_path, quick=True, save=True, resume=True))
    assert again.summary["accuracy"] == accuracy


@pytest.mark.parametrize("technique", ["scratch", "lp_ft", "gradual", "lora"])
def test_techniques_on_images(technique, tmp_path):
    result = finetune(Finetune(out=tmp_path, quick=True, technique=technique, **IMAGES))
    accuracy = means(result, "accuracy")
    assert accuracy[technique] > accuracy["majority"] + 0.05
    assert technique != "lp_ft" or accuracy["lp_ft"] > accuracy["probe"] - 0.1  # whose head it begins with
    assert {"confusion", "surest_errors"} <= figures(tmp_path)


def test_a_vision_transformer_and_what_it_saves(tmp_path):
    """A folder with a ViT, a small one of random weights: its own preprocessing is used, saved and used again."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = tmp_path / "vit"
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 16, "patch_size": 4, **sizes})
    )
    half = [0.5] * 3
    (base / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 16, "width": 16}, "image_mean": half, "image_std": half})
    )
    whole = save(scratch(base, key=jax.random.key(0)), tmp_path / "whole", tokenizer=base)
    for model, out in ((whole, tmp_path / "first"), (tmp_path / "first" / "model", tmp_path / "second")):
        config = Finetune(
            out=out, quick=True, model=str(model), data="uci_digits", learning_rate=3e-3, save=True
        )
        result = finetune(config)
    # Of ten classes, from random weights; the second run starts from what the first saved.
    assert result.summary["accuracy"]["full"]["mean"] > 0.4


# --- one short run of each study: the command, its settings, and what it is for ---------------------


def means(result, metric):
    """A metric's mean by arm."""
    return {arm: own["mean"] for arm, own in result.summary[metric].items()}


def compare(result, folder):
    assert list(means(result, "accuracy_text_64")) == [
        "majority",
        "probe",
        "scratch",
        "head",
        "lp_ft",
        "full",
    ]
    # A fair comparison: the same architecture and updates, but for the head, which is cheap on cached features.
    flops = means(result, "flops_per_example_text_64")
    assert 1000 * flops["head"] < flops["full"] == pytest.approx(flops["scratch"], rel=0.01)
    steps = {row["arm"]: row["steps"] for row in result.rows}
    assert steps["scratch"] == steps["lp_ft"] == steps["full"] == steps["head"] / 10
    for row in result.rows:
        assert row["arm"] in ("majority", "probe") or row["gap"] == row["train_accuracy"] - row["accuracy"]
    assert "The promises" in (folder / "report.md").read_text()


def choose_model(result, folder):
    assert all(-1 <= tau <= 1 for tau in means(result, "weighted_tau").values())
    rows = {row["arm"]: row for row in result.rows}
    for score in ("logme", "leep", "nce"):  # the pretrained layers are chosen before random ones
        assert rows["minilm:3"][score] > rows["minilm:random"][score], score


def sweep(result, folder):
    ratio = means(result, "time_ratio")
    assert ratio["programs"] < 1 and ratio["programs"] < ratio["one_process"]
    text = (folder / "report.md").read_text()
    furthest = float(text.split("differs by more than ")[1].split(" ")[0])
    assert furthest <= 0.02  # of 200 validation texts, in another order of sums
    tested = {row["learning_rate"] for row in result.rows if "accuracy" in row}
    validated = {
        rate: np.mean([row["validation_accuracy"] for row in result.rows if row["learning_rate"] == rate])
        for rate in {row["learning_rate"] for row in result.rows}
    }
    assert tested == {max(validated, key=validated.get)}


def tune(result, folder):
    assert {row["arm"] for row in result.rows} == {"loreft"}  # the last that images can have
    accuracy = {row["rate"]: row["validation_accuracy"] for row in result.rows}
    assert (
        len(accuracy) == 3
        and f"| loreft | {max(accuracy, key=accuracy.get):.2g} |" in (folder / "report.md").read_text()
    )


def adapters(result, folder):
    parameters, memory = means(result, "trained_parameters_text"), means(result, "peak_memory_text")
    assert parameters["ia3"] < parameters["lora"] < 1e6 and set(memory) == {"ia3", "lora"}
    accuracy = means(result, "accuracy_text")
    assert (
        set(accuracy) == {"lora", "ia3", "probe"} and min(accuracy.values()) > 0.5
    )  # of two classes, balanced
    # Little is trained in ten updates, so that little of the other task can be lost.
    assert all(abs(lost) < 0.2 for lost in means(result, "forgetting_text").values())


def merge(result, folder):
    soup, tasks = means(result, "accuracy_soup"), means(result, "accuracy_tasks")
    assert {"member", "uniform_soup", "greedy_soup", "fisher", "slerp", "wise_ft"} <= set(soup)
    assert tasks["alone"] >= tasks["start"]
    # Along the line from the start to the best member: its end is that member, and wise_ft one of its points.
    line = {point["weight"]: point["accuracy"] for point in lines(folder)[0]["curve"]}
    assert line[1.0] == pytest.approx(soup["best"], abs=0.02)
    assert min(abs(soup["wise_ft"] - accuracy) for accuracy in line.values()) <= 0.02


def domain_pretraining(result, folder):
    assert {"accuracy", "mlm_loss_domain", "mlm_loss_other"} <= set(result.summary)
    for domain in ("domain", "other"):
        losses = means(result, f"mlm_loss_{domain}")
        assert list(losses) == ["none", "domain", "other", "replay"]
        assert min(losses, key=losses.get) == domain  # each learns best what it reads
        assert losses["replay"] < losses["none"]


def bench_lora(result, folder):
    assert means(result, "flops_over_minimum")["lora"] <= 1.03
    assert means(result, "memory_ratio")["peft"] >= 1
    assert set(result.summary["step_ratio"]) == {"fixed", "rotten_tomatoes"}


def bench_generate(result, folder):
    assert means(result, "same_tokens")["one_text"] == 1  # 16 tokens are too few for a near tie
    assert set(result.summary["token_ratio"]) == {"one_text", "batch"}
    assert {"jtl", "transformers"} == set(result.summary["tokens_per_second_batch"])
    with pytest.raises(ValueError, match="reviews are as long"):
        run("benchmarks.generate", folder / "long", prompt_tokens=500)


def bench_domain(result, folder):
    assert set(result.summary["step_ratio"]) == {"skada_dann", "skada_coral", "torch_dann", "torch_coral"}
    accuracy = means(result, "accuracy")
    assert set(accuracy) == {"jtl_dann", "skada_dann", "jtl_coral", "skada_coral"}
    assert min(accuracy["jtl_coral"], accuracy["skada_coral"]) > 0.3  # of ten classes
    for method in ("dann", "coral"):
        assert means(result, "loss_difference")[method] < 1e-4
        assert means(result, "gradient_difference")[method] < 1e-3


def bench_maml(result, folder):
    assert set(result.summary["step_ratio"]) == {"functional_torch", "loop_torch"}
    assert max(means(result, "gradient_difference").values()) < 3e-2
    memory = means(result, "memory")
    assert memory["remat_5"] < memory["kept_5"] < memory["vmap_5"]
    # What remat adds by inner steps is their parameters; what keeping adds, their forwards.
    assert memory["remat_5"] - memory["remat_1"] < (memory["kept_5"] - memory["kept_1"]) / 2


PARITY = pytest.mark.parity
PEFT = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's own
RUNS = [
    ("compare", {}, compare),
    ("choose_model", {}, choose_model),
    ("sweep", {}, sweep),
    ("tune", IMAGES, tune),
    ("adapters", {}, adapters),
    ("merge", {}, merge),
    ("domain_pretraining", {}, domain_pretraining),
    pytest.param("benchmarks.lora", {}, bench_lora, marks=(PARITY, PEFT)),
    pytest.param("benchmarks.generate", {}, bench_generate, marks=PARITY),
    pytest.param("benchmarks.domain", {}, bench_domain, marks=PARITY),
    pytest.param("benchmarks.maml", {}, bench_maml, marks=PARITY),
]


def run(command, out, **settings):
    """The result of a command with ``--quick``."""
    module = import_module(f"experiments.{command}")
    (config,) = (
        own
        for own in vars(module).values()
        if isinstance(own, type) and issubclass(own, Config) and own.__module__ == module.__name__
    )
    return module.run(config(out=out, quick=True, **settings))


def lines(folder):
    """The entries of rows.jsonl."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("command", "settings", "holds"), RUNS)
def test_a_short_real_run(command, settings, holds, tmp_path):
    if command == "benchmarks.domain":
        pytest.importorskip("skada")
    result = run(command, tmp_path, **settings)
    holds(result, tmp_path)
    if command in ("compare", "domain_pretraining"):  # a killed run goes on with what it has measured
        again = run(command, tmp_path, resume=True, **settings)
        assert again.rows == result.rows and again.summary == result.summary
