"""The application of summarization: a short real run, its adapter used again, ROUGE, and inputs that it refuses."""

import json
from dataclasses import replace

import jax
import pytest

from experiments.summarization import Summarization, Trainer, predict, rouge, run, shortened
from jtl import pretrained

TINY = {
    "llama": {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "tie_word_embeddings": True},
    "t5": {"vocab_size": 49152, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
}  # fmt: skip


def tiny(kind, tmp_path):
    """Settings with a small network of random weights, SmolLM2's tokenizer, and texts of our own."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **TINY[kind]}))
    model = pretrained.scratch(tmp_path, key=jax.random.key(0))
    pretrained.save(model, tmp_path / "model", tokenizer="smollm2")
    rows = [{"text": f"The number {i} stands here in a text.", "summary": f"Number {i}."} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "own.jsonl"),
        "prompt": "{text}\nShort:",
    }
    return Summarization(out=tmp_path / "run", quick=True, max_summary=8, **settings)


@pytest.mark.slow
def test_t5_learns_behind_its_encoder(tmp_path):
    config = tiny("t5", tmp_path)
    config.out.mkdir()
    row, curve = Trainer(shortened(config)).measured("transfer", 0)
    assert row["rougeL"] >= 0 and curve[-1]["validation_loss"] < 20
    assert (config.out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_summarization(tmp_path, capsys):
    """Of a network whose weights are random: what it learns is not asked."""
    config = tiny("llama", tmp_path)
    found = {arm: own["mean"] for arm, own in run(config).summary["rougeL"].items()}
    assert set(found) == {"lead", "before", "transfer", "scratch"} and found["lead"] > 0.2
    assert "Before and after" in (tmp_path / "run" / "report.md").read_text()
    written = json.loads((tmp_path / "run" / "written.json").read_text())
    assert len(written) == 6 and set(written[0]) == {
        "text",
        "summary",
        "lead",
        "before",
        "transfer",
        "scratch",
    }

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["text"] for row in written))
    assert predict(replace(config, predict=texts)) is None
    said = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [row["summary"] for row in said] == [
        row["transfer"] for row in written
    ]  # the adapter that was stored
    assert "6 texts summarised" in capsys.readouterr().out


def test_rouge_of_a_hand_made_case():
    pytest.importorskip("rouge_score")
    written = ["the cat on the sat mats"]  # the stem of mats is mat
    found = rouge(written, [{"summary": "the cat sat on the mat"}])
    assert found["rouge1"] == pytest.approx(1.0)
    assert found["rouge2"] == pytest.approx(2 / 5)  # "the cat", "on the"
    assert found["rougeL"] == pytest.approx(5 / 6)  # the cat on the mat
    assert rouge(["nothing"], [{"summary": "a cat"}])["rougeL"] == 0


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Summarization(out=tmp_path, predict=tmp_path / "new.txt"))
    with pytest.raises(ValueError, match="--rank must be at least 1"):
        run(Summarization(out=tmp_path, rank=0))
