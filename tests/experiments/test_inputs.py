"""What a user can get wrong on the command line: each ends in one clear line, before any training."""

import json
import re

import jax
import pytest

from experiments.common import techniques
from experiments.common.command_line import main
from experiments.finetune import Finetune, run
from jtl.pretrained import save, scratch

TEXTS = "text,label\n" + "".join(f"words number {i},{i % 2}\n" for i in range(40))


@pytest.fixture(autouse=True)
def never_trains(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(techniques, "run_arm", refuse)


def write(folder, text, name="data.csv"):
    path = folder / name
    path.write_text(text)
    return str(path)


def other_tokenizer(folder):
    """A BERT of 100 words with the tokenizer of MiniLM, which has 30,522."""
    sizes = {"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "intermediate_size": 8, **sizes}))
    return str(save(scratch(folder, key=jax.random.key(0)), folder / "model", tokenizer="minilm"))


CASES = {
    "unknown model": (lambda d: ["--model", "minilmm"], "Unknown model 'minilmm'.*Did you mean 'minilm'"),
    "unknown data": (
        lambda d: ["--data", "rotten_tomatos"],
        "unknown data set 'rotten_tomatos'; did you mean rotten_toma",
    ),
    "no such file": (lambda d: ["--data", "nowhere/x.csv"], "no data file or folder at nowhere/x.csv"),
    "missing column": (
        lambda d: ["--data", write(d, TEXTS.replace("text,", "review,", 1))],
        "no column 'text'; it has 'review', 'label'",
    ),
    "negative label": (
        lambda d: ["--data", write(d, TEXTS.replace("number 3,1", "number 3,-1"))],
        r"train has label -1 \(example 3\) out of range",
    ),
    "empty file": (lambda d: ["--data", write(d, "text,label\n")], "split train is empty"),
    "images for a text model": (
        lambda d: ["--data", "uci_digits"],
        "--model minilm reads texts, but --data uci_digits holds im",
    ),
    "another model's tokenizer": (
        lambda d: ["--model", other_tokenizer(d), "--data", write(d, TEXTS)],
        r"the tokenizer gives the token \d+ \('.*'\), and the model has embeddings of 0 to 99: take the model's own",
    ),
    "no seeds": (lambda d: ["--seeds", "0"], "--seeds must be at least 1, got 0"),
    "no rate": (lambda d: ["--learning-rate", "0"], "--learning-rate must be over 0, got 0"),
    "an adapter that no weights can hold": (
        lambda d: ["--save", "--technique", "bottleneck", "--train-examples", "64"],
        "--save with --technique bottleneck on minilm: bottleneck is no change of weights",
    ),
    "no epochs": (lambda d: ["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "too few examples": (lambda d: ["--train-examples", "1"], "cannot draw 1 examples"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case, tmp_path, capsys):
    flags, message = CASES[case]
    with pytest.raises(SystemExit) as stop:
        main(run, Finetune, args=["--out", str(tmp_path / "out"), *flags(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "result.json").exists()


def test_used_output_folder(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(run, Finetune, args=["--out", str(tmp_path)])
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_text() == "{}"
