"""The application of art: a short real run, its model used again, folders of one's own, inputs that it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.art.config import Art
from experiments.art.pictures import load_pictures
from experiments.art.study import predict, run
from jtl.data.dataset import DataError
from jtl.data.readers.images import read_image


def paint(folder, count, side=20):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"{i}.png")


@pytest.mark.slow
def test_art(tmp_path):
    out = tmp_path / "run"
    result = run(Art(out=out, quick=True))
    assert set(result.summary["frechet"]) == {"real", "before", "transfer", "scratch"}
    assert result.summary["in_style"]["real"]["mean"] > 0.9
    assert result.summary["frechet"]["real"]["mean"] < result.summary["frechet"]["before"]["mean"]
    assert set(result.summary["held_out_loss"]) == {"transfer", "scratch"}
    by_arm = {row["arm"]: row for row in result.rows}
    assert 0 < by_arm["transfer"]["trained_parameters"] < by_arm["scratch"]["trained_parameters"]
    curves = [json.loads(line)["curve"] for line in (out / "rows.jsonl").read_text().splitlines()]
    assert all(curve[-1]["loss"] < 0.95 * curve[0]["loss"] for curve in curves if curve)
    # Transfer begins in the structure of digits.
    assert by_arm["transfer"]["held_out_loss"] < by_arm["scratch"]["held_out_loss"]

    again = run(Art(out=out, quick=True, resume=True))
    assert again.rows == result.rows  # from rows.jsonl

    assert predict(Art(out=out, predict="7", count=12, sampling_steps=2)) is None
    assert read_image(out / "predictions.png").shape[1] > 300
    with pytest.raises(
        ValueError, match="--predict cat: no class of this name; there are mnist5k/0, .*, 0, "
    ):
        predict(Art(out=out, predict="cat"))


@pytest.mark.slow
def test_a_folder_of_ones_own(tmp_path):
    paint(tmp_path / "stars", 4)
    flat = load_pictures(str(tmp_path / "stars"), 500)
    assert flat.classes == ("stars",) and flat.like == (None,) and flat.whole and flat.real is None
    assert sorted(flat.pool.labels) == sorted(flat.reference.labels) == [10] * 4
    assert len(flat.split(2, 0)[0]) == 4  # all of them
    assert flat.pool.batch(np.arange(4))["image"].shape == (4, 28, 28, 3)

    paint(tmp_path / "both" / "3", 5)
    paint(tmp_path / "both" / "moons", 5)
    both = load_pictures(str(tmp_path / "both"), 500)
    assert both.classes == ("3", "moons") and both.like == (3, None)
    assert sorted(both.pool.labels) == [10] * 5 + [11] * 5

    for split, count in (("train", 6), ("test", 4)):
        paint(tmp_path / "split" / split / "a", count)
    held_out = load_pictures(str(tmp_path / "split"), 500)
    assert not held_out.whole and len(held_out.pool) + len(held_out.reference) + len(held_out.real) <= 10
    assert len(held_out.split(2, 0)[0]) == 2


def test_the_style_is_made_of_digits_that_pretraining_never_saw():
    made = load_pictures("poster", 100)
    assert made.classes == made.old_classes and made.like == tuple(range(10))
    few, others = made.split(2, seed=0)
    assert np.bincount(few.labels).tolist() == [0] * 10 + [2] * 10 and len(others) == 100
    assert len(made.reference) == len(made.real) == 100

    def ink(images):  # red where there is ink: the digit, whatever its style
        return {(image[..., -1] < 60).tobytes() for image in images.pixels}

    assert not ink(made.pool) & ink(made.reference) and not ink(made.reference) & ink(made.real)


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Art(out=tmp_path, predict="7"))
    with pytest.raises(ValueError, match="--shots must be at least 1, got 0"):
        run(Art(out=tmp_path / "run", shots=0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: expected pictures .* it holds nothing"):
        run(Art(out=tmp_path / "run", data=str(tmp_path / "empty")))
    with pytest.raises(DataError, match="holds texts; art needs pictures"):
        run(Art(out=tmp_path / "run2", data="rotten_tomatoes"))
