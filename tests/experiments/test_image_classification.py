"""The application of image classification: a short real run, its model used again, and inputs that it refuses."""

import csv

import pytest
from PIL import Image

from experiments.image_classification import ImageClassification, predict, run
from jtl import data


@pytest.mark.slow
def test_image_classification(tmp_path):
    result = run(ImageClassification(out=tmp_path / "run", quick=True))
    accuracy = {arm: own["mean"] for arm, own in result.summary["accuracy"].items()}
    assert set(accuracy) == {"transfer", "scratch", "probe_efficientnet-lite0"}
    assert accuracy["transfer"] > 0.4 and accuracy["transfer"] > accuracy["scratch"]  # of ten classes
    probe = accuracy["probe_efficientnet-lite0"]
    assert (
        probe > accuracy["scratch"] and accuracy["transfer"] > probe - 0.05
    )  # it begins with the probe's head

    test, pictures = data.load("mnist5k").splits["test"], tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.fromarray(test[i]["image"].squeeze()).save(pictures / f"{i:02d}.png")
    assert predict(ImageClassification(out=tmp_path / "run", predict=pictures)) is None
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = data.load("mnist5k").classes
    hits = [row["label"] == names[int(test[i]["label"])] for i, row in enumerate(rows)]
    assert len(hits) == 20 and sum(hits) > 10


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(ImageClassification(out=tmp_path, predict=tmp_path / "new.png"))
    with pytest.raises(ValueError, match="--shots must be at least 1"):
        run(ImageClassification(out=tmp_path, shots=0))
