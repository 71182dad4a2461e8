"""The application of question answering: a short real run, its model used again, and inputs that it refuses."""

import json

import pytest

from experiments.data.docstring_questions import ask
from experiments.data.docstrings import docstrings
from experiments.question_answering import QuestionAnswering, by_kind, highlighted, predict, run


@pytest.mark.slow
def test_question_answering(tmp_path, capsys):
    squad(tmp_path / "own.json")
    few = {"updates": 8, "batch_size": 4, "max_length": 64, "stride": 16}
    config = QuestionAnswering(out=tmp_path / "run", quick=True, data=str(tmp_path / "own.json"), **few)
    f1 = {arm: own["mean"] for arm, own in run(config).summary["f1"].items()}
    assert set(f1) == {"transfer", "scratch"} and all(0 <= own <= 1 for own in f1.values())
    assert "Surest errors" in (tmp_path / "run" / "report.md").read_text()

    asked = [{"question": "What type is `n`?", "context": "Parameters\nn : float, optional\n    How many."}]
    (tmp_path / "ask.json").write_text(json.dumps(asked))
    config = QuestionAnswering(out=tmp_path / "run", predict=tmp_path / "ask.json")
    assert predict(config) is None
    said = json.loads((tmp_path / "run" / "predictions.json").read_text())[0]
    assert asked[0]["context"][said["start"] :].startswith(said["answer"]) and 0 < said["probability"] <= 1
    assert "1 questions answered" in capsys.readouterr().out


def squad(path):
    """The questions about joblib in SQuAD's layout."""
    paragraphs = [
        {
            "context": one["context"],
            "qas": [
                {
                    "question": one["question"],
                    "answers": [{"text": one["answers"][0], "answer_start": one["starts"][0]}],
                }
            ],
        }
        for docstring in docstrings("joblib")
        for one in ask(docstring)
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:60]}]}))


def test_an_answer_is_shown_in_its_context():
    context = "Parameters\n" + "x" * 200 + "\naxis : int, default=None\n" + "y" * 200
    start = context.index("int")
    row = {"question": "What is *it*?", "context": context, "answers": ["int"],
           "said": {"answer": "int", "start": start, "probability": 0.9}}  # fmt: skip
    shown = highlighted(row)
    assert shown.startswith("**What is \\*it\\*?** (0.90)") and "axis : **int**, default=None" in shown
    assert "Right:" not in shown and shown.count("…") == 2
    assert "Right: None" in highlighted({**row, "answers": ["None"]})


def test_kinds_and_new_wordings_are_told_apart():
    examples = [
        {"answers": ["int"], "kind": "type", "new": 0},
        {"answers": ["a b"], "kind": "meaning", "new": 1},
        {"answers": ["bool"], "kind": "type", "new": 1},
    ]
    said = [{"answer": "int"}, {"answer": "b"}, {"answer": "float"}]
    found = by_kind(examples, said)
    assert found == pytest.approx(
        {"f1_meaning": 1.0, "f1_type": 0.5, "f1_old_wordings": 1.0, "f1_new_wordings": 0.5}
    )  # an article does not count
    assert by_kind([{"answers": ["x"]}], [{"answer": "x"}]) == {}


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(QuestionAnswering(out=tmp_path, predict=tmp_path / "ask.json"))
    with pytest.raises(ValueError, match="--updates must be at least 1"):
        run(QuestionAnswering(out=tmp_path, updates=0))
