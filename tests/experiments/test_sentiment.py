"""The application of sentiment: a short real run, its model used again, and inputs that it refuses."""

import csv

import pytest

from experiments.sentiment import Sentiment, main, run


@pytest.mark.slow
def test_sentiment(tmp_path, capsys):
    result = run(Sentiment(out=tmp_path / "run", quick=True))
    accuracy = {arm: own["mean"] for arm, own in result.summary["accuracy"].items()}
    assert set(accuracy) == {"majority", "transfer", "scratch", "prompt"}
    assert accuracy["transfer"] > accuracy["majority"] and accuracy["prompt"] > accuracy["majority"]
    assert (tmp_path / "run" / "what_it_leans_on.png").stat().st_size > 20_000

    texts = tmp_path / "new.txt"
    texts.write_text("A masterful, moving and beautiful film.\n\nDull, lifeless and much too long.\n")
    assert main(Sentiment(out=tmp_path / "run", predict=texts)) is None
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["fresh", "rotten"]
    assert "2 texts labelled" in capsys.readouterr().out


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        main(Sentiment(out=tmp_path, predict=tmp_path / "new.txt"))
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        run(Sentiment(out=tmp_path, epochs=0))
