"""The application of sentiment: a short real run, its model used again, and inputs that it refuses."""

import csv

import pytest

from experiments.sentiment import Sentiment, predict, run


@pytest.mark.slow
def test_sentiment(tmp_path, capsys):
    result = run(Sentiment(out=tmp_path / "run", quick=True))
    accuracy = {arm: own["mean"] for arm, own in result.summary["accuracy"].items()}
    assert set(accuracy) == {"majority", "transfer", "scratch", "prompt"}
    assert accuracy["transfer"] > max(accuracy["majority"], accuracy["scratch"])
    assert accuracy["prompt"] > accuracy["majority"]

    texts = tmp_path / "new.txt"
    texts.write_text("A masterful, moving and beautiful film.\n\nDull, lifeless and much too long.\n")
    assert predict(Sentiment(out=tmp_path / "run", predict=texts)) is None
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["fresh", "rotten"]
    assert "2 texts labelled" in capsys.readouterr().out


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Sentiment(out=tmp_path, predict=tmp_path / "new.txt"))
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        run(Sentiment(out=tmp_path, epochs=0))
