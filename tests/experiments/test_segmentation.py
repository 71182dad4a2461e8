"""The application of segmentation: a short real run on a small trunk, its model used again, inputs that it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.data.scenes import load_scenes
from experiments.segmentation import Segmentation, predict, run


@pytest.mark.slow
def test_segmentation(tmp_path, small_trunk):
    result = run(Segmentation(out=tmp_path / "run", quick=True, model=small_trunk))
    assert set(result.summary["mean_iou"]) == {"transfer", "scratch"}
    assert 0 < result.summary["mean_iou"]["scratch"]["mean"] < 1
    curves = [
        json.loads(line)["curve"] for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    ]
    assert all(curve[-1]["loss"] < 0.8 * curve[0]["loss"] for curve in curves)
    for row in result.rows:
        confusion = np.array(row["confusion"])
        assert confusion.sum() == 60 * 64 * 64  # every pixel of the test images counts once
        assert row["pixel_accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
        assert row["mean_iou"] < row["mean_dice"] < 1

    again = run(Segmentation(out=tmp_path / "run", quick=True, model=small_trunk, resume=True))
    assert again.rows == result.rows  # from rows.jsonl

    test, pictures = load_scenes(64, test=3).splits["test"], tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(test[i]["image"]).resize((160, 128)).save(pictures / f"{i}.png")
    assert predict(Segmentation(out=tmp_path / "run", predict=pictures)) is None
    for i in range(3):
        mask = np.asarray(Image.open(tmp_path / "run" / "predictions" / f"{i}.png"))
        assert mask.shape == (128, 160) and mask.max() <= 10
    assert (tmp_path / "run" / "predictions.png").exists()


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Segmentation(out=tmp_path, predict=tmp_path / "new.png"))
    with pytest.raises(FileNotFoundError, match="no data file or folder at .*nowhere"):
        run(Segmentation(out=tmp_path / "run", data=str(tmp_path / "nowhere")))
