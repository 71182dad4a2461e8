"""The application of detection: a short real run on a small trunk, its model used again, and inputs that it refuses."""

import csv
import json

import pytest
from PIL import Image

from experiments.data.scenes import load_scenes
from experiments.detection import Detection, predict, run


@pytest.mark.slow
def test_detection(tmp_path, small_trunk):
    result = run(Detection(out=tmp_path / "run", quick=True, model=small_trunk))
    assert set(result.summary["map_50"]) == {"transfer", "scratch"}
    curves = [
        json.loads(line)["curve"] for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    ]
    assert all(curve[-1]["loss"] < 0.8 * curve[0]["loss"] for curve in curves)
    for row in result.rows:
        assert 0 <= row["map"] <= row["map_50"] <= 1 and row["map_75"] <= row["map_50"]

    again = run(Detection(out=tmp_path / "run", quick=True, model=small_trunk, resume=True))
    assert again.rows == result.rows  # from rows.jsonl

    test, pictures = load_scenes(64, test=3).splits["test"], tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(test[i]["image"]).resize((160, 128)).save(pictures / f"{i}.png")
    assert predict(Detection(out=tmp_path / "run", predict=pictures)) is None
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert 0 <= float(row["left"]) <= float(row["right"]) <= 160 and float(row["score"]) >= 0.35
        assert 0 <= float(row["top"]) <= float(row["bottom"]) <= 128 and row["label"] in "0123456789"
    assert (tmp_path / "run" / "predictions.png").exists()


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Detection(out=tmp_path, predict=tmp_path / "new.png"))
    with pytest.raises(ValueError, match="--image-size must be a multiple of 32"):
        run(Detection(out=tmp_path, image_size=100))
    with pytest.raises(ValueError, match="--updates must be at least 1, got 0"):
        run(Detection(out=tmp_path, updates=0))
    with pytest.raises(ValueError, match="--learning-rate must be over 0, got 0"):
        run(Detection(out=tmp_path, learning_rate=0.0))
    with pytest.raises(FileNotFoundError, match="no data file or folder at .*nowhere"):
        run(Detection(out=tmp_path / "run", data=str(tmp_path / "nowhere")))
