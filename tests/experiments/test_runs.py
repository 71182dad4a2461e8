"""Every experiment for real, on real weights and data, as short as ``--quick`` makes it."""

import json

import jax
import pytest

from experiments.adapters import Adapters
from experiments.adapters import run as adapters
from experiments.benchmarks.domain import BenchDomain
from experiments.benchmarks.domain import run as bench_domain
from experiments.benchmarks.generate import BenchGenerate
from experiments.benchmarks.generate import run as bench_generate
from experiments.benchmarks.lora import BenchLora
from experiments.benchmarks.lora import run as bench_lora
from experiments.benchmarks.maml import BenchMaml
from experiments.benchmarks.maml import run as bench_maml
from experiments.choose_model import SCORES, ChooseModel
from experiments.choose_model import run as choose_model
from experiments.compare import Compare
from experiments.compare import run as compare
from experiments.domain_pretraining import ARMS, DomainPretraining
from experiments.domain_pretraining import run as domain_pretraining
from experiments.finetune import Finetune
from experiments.finetune import run as finetune
from experiments.merge import Merge
from experiments.merge import run as merge
from experiments.sweep import SweepConfig
from experiments.sweep import run as sweep
from experiments.tune import Tune
from experiments.tune import run as tune
from jtl.pretrained import save, scratch

pytestmark = pytest.mark.slow


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
    config = Finetune(
        out=tmp_path,
        quick=True,
        model="efficientnet-lite0",
        data="uci_digits",
        image_size=32,
        technique=technique,
    )
    result = finetune(config)
    assert result.summary["accuracy"][technique]["mean"] > 0.15
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


def test_tune_leaves_text_methods_out_of_images(tmp_path):
    config = Tune(out=tmp_path, quick=True, model="efficientnet-lite0", data="uci_digits", image_size=32)
    result = tune(config)
    assert {row["arm"] for row in result.rows} == {"loreft"}  # the last that images can have


def test_compare(tmp_path):
    result = compare(Compare(out=tmp_path, quick=True))
    assert set(result.summary["accuracy_text_64"]) == {
        "majority",
        "probe",
        "scratch",
        "head",
        "lp_ft",
        "full",
    }
    assert "The promises" in (tmp_path / "report.md").read_text()
    again = compare(Compare(out=tmp_path, quick=True, resume=True))
    assert again.rows == result.rows


def test_choose_model(tmp_path):
    result = choose_model(ChooseModel(out=tmp_path, quick=True))
    assert set(result.summary["weighted_tau"]) == set(SCORES)
    assert {"logme_against_accuracy"} <= figures(tmp_path)


def test_sweep(tmp_path):
    result = sweep(SweepConfig(out=tmp_path, quick=True))
    assert len(result.rows) == 4 and set(result.summary["time_ratio"]) == {"programs", "one_process"}
    assert {"learning_rates"} <= figures(tmp_path)
    text = (tmp_path / "report.md").read_text()
    furthest = float(text.split("differs by more than ")[1].split(" ")[0])
    assert furthest <= 0.02  # of 200 validation texts, in another order of sums


def test_adapters(tmp_path):
    result = adapters(Adapters(out=tmp_path, quick=True))
    assert set(result.summary["accuracy_text"]) == {"lora", "ia3", "probe"}
    parameters = result.summary["trained_parameters_text"]
    assert parameters["ia3"]["mean"] < parameters["lora"]["mean"] < 1e6
    assert {"text_accuracy_against_parameters"} <= figures(tmp_path)


def test_merge(tmp_path):
    result = merge(Merge(out=tmp_path, quick=True))
    assert {"member", "uniform_soup", "greedy_soup", "wise_ft"} <= set(result.summary["accuracy_soup"])
    assert {"alone", "start", "ties", "regmean"} <= set(result.summary["accuracy_tasks"])
    assert {"from_the_start_to_the_best_member"} <= figures(tmp_path)


def test_domain_pretraining(tmp_path):
    result = domain_pretraining(DomainPretraining(out=tmp_path, quick=True))
    assert {"accuracy", "mlm_loss_domain", "mlm_loss_other"} <= set(result.summary)
    for domain in ("domain", "other"):
        losses = {arm: own["mean"] for arm, own in result.summary[f"mlm_loss_{domain}"].items()}
        assert tuple(losses) == ARMS
        assert min(losses, key=losses.get) == domain  # each learns best what it reads
    assert {"learning_the_domain", "forgetting"} <= figures(tmp_path)
    again = domain_pretraining(DomainPretraining(out=tmp_path, quick=True, resume=True))
    assert again.rows == result.rows


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_bench_lora(tmp_path):
    result = bench_lora(BenchLora(out=tmp_path, quick=True))
    assert result.summary["flops_over_minimum"]["lora"]["mean"] <= 1.03
    assert result.summary["memory_ratio"]["peft"]["mean"] >= 1
    assert set(result.summary["step_ratio"]) == {"fixed", "rotten_tomatoes"}


@pytest.mark.parity
def test_bench_generate(tmp_path):
    summary = bench_generate(BenchGenerate(out=tmp_path, quick=True)).summary
    assert set(summary["token_ratio"]) == {"one_text", "batch"}
    assert summary["same_tokens"]["one_text"]["mean"] == 1  # 16 tokens are too few for a near tie
    assert {"jtl", "transformers"} == set(summary["tokens_per_second_batch"])
    with pytest.raises(ValueError, match="reviews are as long"):
        bench_generate(BenchGenerate(out=tmp_path / "long", quick=True, prompt_tokens=500))


@pytest.mark.parity
def test_bench_domain(tmp_path):
    pytest.importorskip("skada")
    result = bench_domain(BenchDomain(out=tmp_path, quick=True))
    assert set(result.summary["step_ratio"]) == {"skada_dann", "skada_coral", "torch_dann", "torch_coral"}
    accuracy = result.summary["accuracy"]
    assert set(accuracy) == {"jtl_dann", "skada_dann", "jtl_coral", "skada_coral"}
    assert min(accuracy["jtl_coral"]["mean"], accuracy["skada_coral"]["mean"]) > 0.3  # of ten classes
    for method in ("dann", "coral"):
        assert result.summary["loss_difference"][method]["mean"] < 1e-4
        assert result.summary["gradient_difference"][method]["mean"] < 1e-3


@pytest.mark.parity
def test_bench_maml(tmp_path):
    summary = bench_maml(BenchMaml(out=tmp_path, quick=True)).summary
    assert set(summary["step_ratio"]) == {"functional_torch", "loop_torch"}
    assert max(own["mean"] for own in summary["gradient_difference"].values()) < 3e-2
    memory = {arm: own["mean"] for arm, own in summary["memory"].items()}
    assert memory["remat_5"] < memory["kept_5"] < memory["vmap_5"]
    # What remat adds by inner steps is their parameters; what keeping adds, their forwards.
    assert memory["remat_5"] - memory["remat_1"] < (memory["kept_5"] - memory["kept_1"]) / 2
