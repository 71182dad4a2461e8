"""Your own boxes in COCO's layout, your own masks, and public sets with either: what is read, and what is refused."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jtl.data import DataError, load
from jtl.data.sets.digits import encode_png

# --- boxes -----------------------------------------------------------------------------------------


def annotations(count=20):
    return {
        "images": [{"id": 100 + i, "file_name": f"{i}.png"} for i in range(count)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"image_id": 100 + i, "category_id": (7, 3)[i % 2], "bbox": [2, 3, 10 + i % 2, 5]}
            for i in range(count - 1)
        ],
    }  # the last image shows neither


def write_boxes(folder, raw, where="images"):
    (folder / where).mkdir(parents=True, exist_ok=True)
    for row in raw["images"]:
        pixels = np.full((20, 30, 3), int(row["file_name"].split(".")[0]), np.uint8)
        Image.fromarray(pixels).save(folder / where / row["file_name"])
    (folder / "annotations.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("where", ["images", "."])
def test_coco_layout(tmp_path, where):
    one = load(write_boxes(tmp_path, annotations(), where), "boxes")
    assert one.classes == ("cat", "dog")  # by their ids
    sizes = {split: len(source) for split, source in one.splits.items()}
    assert sum(sizes.values()) == 20 and min(sizes.values()) > 0 and len(one.notes) == 2
    seen = set()
    for source in one.splits.values():
        for i in range(len(source)):
            row = source[i]
            number = int(row["image"][0, 0, 0])
            seen.add(number)
            assert row["image"].shape == (20, 30, 3)
            if number == 19:
                assert row["boxes"].shape == (0, 4) and row["box_label"].shape == (0,)
            else:
                assert row["boxes"].tolist() == [[2, 3, 12 + number % 2, 8]]
                assert row["box_label"].tolist() == [(1, 0)[number % 2]]
    assert seen == set(range(20))


def test_coco_layout_by_split(tmp_path):
    for split in ("train", "val", "test"):
        write_boxes(tmp_path / split, annotations(4))
    one = load(tmp_path, "boxes")
    assert {split: len(source) for split, source in one.splits.items()} == {
        "train": 4,
        "validation": 4,
        "test": 4,
    }
    assert not one.notes


def test_crowds_and_empty_boxes_are_left_out(tmp_path):
    raw = annotations()
    raw["annotations"][0]["iscrowd"] = 1
    raw["annotations"][1]["bbox"] = [2, 3, 0, 5]
    one = load(write_boxes(tmp_path, raw), "boxes")
    assert "2 boxes of" in one.notes[0]
    assert sum(len(s[i]["box_label"]) for s in one.splits.values() for i in range(len(s))) == 17


BROKEN = {
    "no file": (
        lambda raw: None,
        "found no annotations.json, in COCO's layout, beside the images; the folder holds",
    ),
    "no list": (lambda raw: raw.pop("categories"), "expected lists called images, annotations, categories"),
    "field": (
        lambda raw: raw["annotations"][2].pop("bbox"),
        r"annotations\[2\] should have image_id, category_id, bbox",
    ),
    "image": (
        lambda raw: raw["annotations"][1].update(image_id=5),
        r"annotations\[1\] has image_id 5, which is not in",
    ),
    "category": (
        lambda raw: raw["annotations"][1].update(category_id=5),
        r"annotations\[1\] has category_id 5",
    ),
    "bbox": (
        lambda raw: raw["annotations"][1].update(bbox=[1, 2]),
        r"has bbox \[1, 2\]; expected left, top, width and",
    ),
    "nothing": (lambda raw: raw.update(annotations=[]), "train has no boxes, so there is nothing to learn"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations(tmp_path, case):
    change, message = BROKEN[case]
    raw = annotations()
    change(raw)
    write_boxes(tmp_path, raw)
    if case == "no file":
        (tmp_path / "annotations.json").unlink()
    with pytest.raises(DataError, match=message):
        load(tmp_path, "boxes")


def test_missing_images(tmp_path):
    write_boxes(tmp_path, annotations())
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match="image '3.png' is neither beside it nor in images/"):
        load(tmp_path, "boxes")
    with pytest.raises(FileNotFoundError, match="no data file or folder at"):
        load(tmp_path / "nowhere", "boxes")


# --- masks -----------------------------------------------------------------------------------------


def write_masks(folder, count=20, palette=False, top=2):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((12, 16, 3), i, np.uint8)).save(folder / "images" / f"{i}.jpg", quality=100)
        values = np.zeros((12, 16), np.uint8)
        values[:, 8:], values[0] = i % (top + 1), 255
        mask = Image.fromarray(values)
        if palette:
            mask.putpalette([9, 8, 7] * 256)
        mask.save(folder / "masks" / f"{i}.png")
    return folder


@pytest.mark.parametrize("palette", [False, True])
def test_mask_layout(tmp_path, palette):
    one = load(write_masks(tmp_path, palette=palette), "masks")
    assert one.classes == ("0", "1", "2") and len(one.notes) == 2
    assert sum(map(len, one.splits.values())) == 20
    row = one.splits["train"][0]
    number = int(row["image"][0, 0, 0])
    assert (
        row["image"].shape == (12, 16, 3)
        and row["mask"].shape == (12, 16, 1)
        and row["mask"].dtype == np.uint8
    )
    assert (
        (row["mask"][1:, 8:] == number % 3).all()
        and (row["mask"][1:, :8] == 0).all()
        and (row["mask"][0] == 255).all()
    )


def test_masks_by_split_with_names(tmp_path):
    for split in ("train", "validation", "test"):
        write_masks(tmp_path / split, 4)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nship\n")
    assert load(tmp_path, "masks").classes == ("sky", "sea", "land", "ship")


def test_broken_masks(tmp_path):
    with pytest.raises(DataError, match="expected images/ and masks/ with files of the same names"):
        load(tmp_path, "masks")
    write_masks(tmp_path, 6)
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    with pytest.raises(DataError, match="names 2 classes, and the masks of train hold 2"):
        load(tmp_path, "masks")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "masks" / "3.png").rename(tmp_path / "masks" / "other.png")
    with pytest.raises(DataError, match="3.jpg: has no mask"):
        load(tmp_path, "masks")
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "masks" / "3.png")
    with pytest.raises(DataError, match="3.png: a mask of mode RGB; expected one channel"):
        load(tmp_path, "masks")
    for split in ("train", "test"):
        write_masks(tmp_path / "own" / split, 4, top=1 if split == "train" else 3)
    with pytest.raises(
        DataError, match="split test: has pixels of 2; the 2 classes are 0 to 1, and 255 is none"
    ):
        load(tmp_path / "own", "masks")


# --- TensorFlow Datasets ---------------------------------------------------------------------------


class Seen(tfds.core.GeneratorBasedBuilder):
    """Images with objects, as VOC has them, and with masks, as the pets have them; test without labels."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True
    name = "jtl_seen"

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "objects": tfds.features.Sequence({
                "label": tfds.features.ClassLabel(names=["cat", "dog"]), "bbox": tfds.features.BBoxFeature(),
            }),
        })  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        sizes = {"train": 30, "validation": 5, "test": 5}
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            mask = np.zeros((10, 20), np.uint8)
            mask[:, 10:] = i % 3
            box = tfds.features.BBox(ymin=0.1, xmin=0.25, ymax=0.5, xmax=1.0)
            objects = [] if split == "test" else [{"label": i % 2, "bbox": box}] * (1 + i % 3)
            yield i, {"image": encode_png(np.full((10, 20, 3), i, np.uint8)),
                      "segmentation_mask": encode_png(mask), "objects": objects}  # fmt: skip


@pytest.fixture
def seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    Seen(data_dir=tmp_path, file_format="array_record").download_and_prepare()


def test_public_boxes(seen):
    one = load("tfds:jtl_seen", "boxes")
    assert one.classes == ("cat", "dog")
    assert {split: len(source) for split, source in one.splits.items()} == {
        "train": 27,
        "validation": 3,
        "test": 5,
    }
    assert one.notes[:2] == ("the test split is not labelled", "no labelled test split: validation is test")
    for i in range(5):
        row = one.splits["test"][i]
        number = int(row["image"][0, 0, 0])
        np.testing.assert_allclose(row["boxes"], [[5, 1, 20, 5]] * (1 + number % 3))
        assert row["box_label"].tolist() == [number % 2] * (1 + number % 3)


def test_public_masks(seen):
    one = load("tfds:jtl_seen", "masks")
    assert one.classes == ("0", "1", "2") and len(one.splits["test"]) == 5
    row = one.splits["train"][0]
    number = int(row["image"][0, 0, 0])
    assert row["mask"].shape == (10, 20, 1) and (row["mask"][:, 10:] == number % 3).all()
    with pytest.raises(DataError, match="no image column 'mask'; it has image, segmentation_mask"):
        load("tfds:jtl_seen", "masks", mask_column="mask")


def test_masks_that_count_from_one(seen, monkeypatch):
    monkeypatch.setattr("jtl.data.readers.masks.KNOWN_MASKS", {"jtl_seen": (1, ("one", "two"))})
    one = load("tfds:jtl_seen", "masks")
    assert one.classes == ("one", "two")
    row = one.splits["train"][0]
    number = int(row["image"][0, 0, 0])
    assert (row["mask"][:, :10] == 255).all() and (row["mask"][:, 10:] == (255, 0, 1)[number % 3]).all()


def test_public_sets_without_either(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        DataError, match="expected images and a sequence of objects with a box and a label; it has image"
    ):
        load("tfds:mnist", "boxes")
