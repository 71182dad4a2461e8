"""Your own data: CSV, TSV, JSONL and image folders; and every way in which they can be wrong."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import jtl.data as data
from jtl.data import DataError, load
from jtl.data.readers.tables import read_texts


def write(path, rows, columns=("text", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def rows(n, labels=("no", "yes"), start=0):
    return [(f'text, "number" {i}\nwith a line', labels[i % len(labels)]) for i in range(start, start + n)]


def read(source):
    return [(source[i]["text"], source[i]["label"]) for i in range(len(source))]


# --- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_folder_of_files(tmp_path, ending):
    write(tmp_path / f"train.{ending}", rows(10))
    write(tmp_path / f"dev.{ending}", rows(4, start=100))
    write(tmp_path / f"test.{ending}", rows(6, start=200))
    one = load(tmp_path)
    assert one.kind == "text" and one.classes == ("no", "yes") and one.notes == ()
    assert read(one.splits["train"]) == [(text, int(label == "yes")) for text, label in rows(10)]
    assert [len(source) for source in one.splits.values()] == [10, 4, 6]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_single_file_is_cut_and_says_so(tmp_path, ending):
    path = write(tmp_path / f"mine.{ending}", rows(200), ("review", "verdict"))
    one = load(path, text_column="review", label_column="verdict")
    assert {split: len(source) for split, source in one.splits.items()} == {
        "train": 144,
        "validation": 16,
        "test": 40,
    }
    assert sorted(sum((read(source) for source in one.splits.values()), [])) == sorted(
        (text, int(label == "yes")) for text, label in rows(200)
    )
    assert np.bincount(data.labels(one.splits["test"])).tolist() == [20, 20]
    assert one.notes == (
        "no test split: 40 of 200 examples of train became it, chosen by hash",
        "no validation split: 16 of 160 examples of train became it, chosen by hash",
    )
    again = load(path, text_column="review", label_column="verdict")
    assert read(again.splits["test"]) == read(one.splits["test"]) and again.version == one.version


def test_repeated_texts_stay_on_one_side(tmp_path):
    one = load(write(tmp_path / "mine.csv", rows(100) * 2))
    texts = [{text for text, _ in read(source)} for source in one.splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_leaks_and_blanks_are_noted(tmp_path):
    write(tmp_path / "train.csv", [*rows(10), ("", "no")])
    write(tmp_path / "validation.csv", rows(3))
    write(tmp_path / "test.csv", rows(4, start=8))
    assert load(tmp_path).notes == (
        "1 texts are blank",
        "3 of 3 texts of validation are also in train",
        "2 of 4 texts of test are also in train",
    )


def test_whole_number_labels(tmp_path):
    for path in (tmp_path / "a.csv", tmp_path / "a.jsonl"):
        one = load(write(path, rows(60, labels=(0, 1, 2))))
        assert one.classes == ("0", "1", "2")
        assert (
            sorted(label for source in one.splits.values() for _, label in read(source))
            == [0] * 20 + [1] * 20 + [2] * 20
        )
    # names in alphabetical order, not in order of appearance
    assert load(write(tmp_path / "b.csv", rows(60, labels=("z", "a")))).classes == ("a", "z")


def test_byte_order_mark(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"é{i},{i % 2}\n" for i in range(40)), encoding="utf-8-sig")
    assert len(load(path).splits["train"]) == 28


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("body,label\na,1\n", r"mine.csv, line 2: no column 'text'; it has 'body', 'label'. Choose with --text-column"),
        ("text,sentiment\na,1\n", "no column 'label'; it has 'text', 'sentiment'"),
        ("text,label\n", "mine.csv: split train is empty"),
        ("", "mine.csv: split train is empty"),
        ("text,label\na,0\nb,1,2\n", "line 3: expected 2 cells, found 3; a cell that holds the delimiter needs quotes"),
        ("text,label\na,0\nb\n", "line 3: expected 2 cells, found 1"),
        ("text,label\na,\n", "line 2: 'label' is missing"),
        ("text,label\na,0.5\nb,1\n", "line 2: 'label' is '0.5', no whole number"),
        ("text,label\na,0\nb,one\n", "line 3: 'label' is 'one', no whole number"),
        ("text,label\na,1\nb,2\n", "train has no example of class '0'; add some, or number the classes from 0"),
        ("text,label\na,0\nb,-1\n", r"split train has label -1 \(example 1\) out of range"),
        ("text,label\na,0\nb,123456\n", "holds 123456: is that a class number"),
        ("text,label\n" + "".join(f"a{i},b{i}\n" for i in range(30)), "30 different values in 30 rows: is that"),
        ('text,label\n"a,0\n', "mine.csv, after line 1: unexpected end of data; is a quote left open"),
        ("text,label\na,x\nb,y\n", "train has 2 examples: too few to cut a test split"),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 0}\n{"text": \n', "mine.jsonl, line 2: is not JSON"),
        ("[1, 2]\n", r"line 1: expected a JSON object, found '\[1, 2\]'"),
        ('{"text": null, "label": 0}\n', "line 1: 'text' should be a text, found None"),
        ('{"text": "a", "label": null}\n', "line 1: 'label' is missing"),
        ('{"text": "a", "label": 0.5}\n', "line 1: 'label' is 0.5, no whole number"),
        ('{"text": "a", "label": true}\n', "should be a name or a whole number, found True"),
        ('{"text": "a", "label": ["x"]}\n', r"should be a name or a whole number, found \['x'\]"),
        ('{"text": "a", "label": 0}\n{"text": "b"}\n', "line 2: no column 'label'; it has 'text'"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_labels_of_other_splits(tmp_path):
    write(tmp_path / "train.csv", rows(10))
    write(tmp_path / "test.csv", [("a", "no"), ("b", "maybe")])
    with pytest.raises(
        DataError, match="test.csv, line 3: label 'maybe' of split test is unseen in train, which has 'no'"
    ):
        load(tmp_path)
    write(tmp_path / "train.csv", rows(10, labels=(0, 1)))
    write(tmp_path / "test.csv", [("a", 0), ("b", 2)])
    with pytest.raises(
        DataError, match=r"split test has label 2 \(example 1\) out of range: the 2 classes of train"
    ):
        load(tmp_path)
    write(tmp_path / "test.csv", [])
    with pytest.raises(DataError, match="test.csv: split test is empty"):
        load(tmp_path)


def test_not_utf8(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes("text,label\nété,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="mine.csv: is not UTF-8"):
        load(path)


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file or folder at .*absent.csv"):
        load(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load("nowhere.jsonl")
    with pytest.raises(DataError, match="found neither train.csv .* it holds nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"it holds \['notes.txt'\]"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"expected a file ending in .csv, .tsv, .jsonl"):
        load(tmp_path / "notes.txt")
    write(tmp_path / "test.csv", rows(4))
    with pytest.raises(DataError, match="no train split beside test.csv"):
        load(tmp_path)
    write(tmp_path / "train.csv", rows(4))
    write(tmp_path / "train.jsonl", rows(4))
    with pytest.raises(DataError, match="train.csv and train.jsonl are both split train"):
        load(tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / "reviews.jsonl")
    with pytest.raises(DataError, match="reviews.jsonl: expected the name of a split"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotten_tomatos", "unknown data set 'rotten_tomatos'; did you mean rotten_tomatoes"),
        ("mnist", "did you mean mnist_m or mnist5k"),
        ("zzz", "unknown data set 'zzz'. Known are rotten_tomatoes, newsgroups20, reuters_r8, mnist5k, uci"),
    ],
)  # fmt: skip
def test_unknown_name(name, message):
    with pytest.raises(DataError, match=message):
        load(name)


# --- images ----------------------------------------------------------------------------------------


def paint(path, value, mode="RGB", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_image_folder_with_splits(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            paint(tmp_path / split / "cat" / f"{i}.png", (10, 20, 30))
            paint(tmp_path / split / "dog" / "deep" / f"{i}.jpg", 40, "L")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    one = load(tmp_path)
    assert one.kind == "image" and one.classes == ("cat", "dog") and one.notes == ()
    assert {split: data.labels(source).tolist() for split, source in one.splits.items()} == {
        "train": [0, 0, 0, 1, 1, 1], "validation": [0, 1], "test": [0, 0, 1, 1]
    }  # fmt: skip
    example = one.splits["train"][0]
    assert example["image"].dtype == np.uint8 and example["image"].shape == (4, 5, 3)
    assert example["image"][0, 0].tolist() == [10, 20, 30] and example["label"] == 0
    assert one.splits["train"][5]["image"].shape == (4, 5, 1) and one.splits["train"][5]["label"] == 1


def test_image_folder_without_splits(tmp_path):
    for i in range(20):
        paint(tmp_path / "a" / f"{i}.png", (i, 0, 0))
        paint(tmp_path / "b" / f"{i}.png", (i // 2, 99, 0))  # each picture twice
    one = load(tmp_path)
    sizes = {split: len(source) for split, source in one.splits.items()}
    assert sum(sizes.values()) == 40 and len(one.notes) == 2
    bytes_of = {split: {s[i]["image"].tobytes() for i in range(len(s))} for split, s in one.splits.items()}
    assert not bytes_of["train"] & bytes_of["test"] and not bytes_of["train"] & bytes_of["validation"]
    assert set(data.labels(one.splits["test"]).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("RGBA", (1, 2, 3, 200), [1, 2, 3]), ("LA", (7, 100), [7]), ("1", 1, [255]), ("I;16", 0x1234, [0x12]),
     ("P", 0, [0, 0, 0])],
)  # fmt: skip
def test_image_modes(tmp_path, mode, value, expected):
    for i in range(10):
        paint(tmp_path / "a" / f"{i}.png", value, mode, (6, 6 + i))
        paint(tmp_path / "b" / f"{i}.png", value, mode, (7, 6 + i))
    for source in load(tmp_path).splits.values():
        assert source[0]["image"][0, 0].tolist() == expected


def test_bad_images(tmp_path):
    for i in range(4):
        paint(tmp_path / "train" / "cat" / f"{i}.png", i, "L")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match="train has no example of class 'dog'"):
        load(tmp_path)
    paint(tmp_path / "train" / "dog" / "0.png", 0, "L")
    paint(tmp_path / "test" / "cow" / "0.png", 0, "L")
    with pytest.raises(DataError, match="class 'cow' of split test is unseen in train, which has cat, dog"):
        load(tmp_path)
    (tmp_path / "test" / "cow" / "0.png").unlink()
    (tmp_path / "test" / "cow").rmdir()
    with pytest.raises(DataError, match="test: split test is empty"):
        load(tmp_path)
    paint(tmp_path / "test" / "cat" / "0.png", 0, "L")
    (tmp_path / "train" / "cat" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"cat/broken.png: not an image that can be decoded .* remove or replace it"
    ):
        load(tmp_path)


def test_truncated_image_is_named_before_training(tmp_path):
    from jtl.data.encode.image import Preprocess, prepare

    rng = np.random.default_rng(0)
    for i in range(4):
        for name in ("cat", "dog"):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.jpg")
    for split in ("validation", "test"):
        paint(tmp_path / split / "cat" / "0.png", 0, "L")
    half = tmp_path / "train" / "dog" / "2.jpg"
    half.write_bytes(half.read_bytes()[:1500])
    one = load(tmp_path)  # the header is whole
    with pytest.raises(
        DataError, match=r"dog/2.jpg: not an image that can be decoded \(image file is truncated"
    ):
        prepare(one.splits["train"], Preprocess((8, 8), (0.5,), (0.5,)))


def test_texts_without_labels(tmp_path):
    lines = tmp_path / "new.txt"
    lines.write_text(" one \n\ntwo\n")
    table = write(tmp_path / "new.csv", [("one, two",), ("three",)], ("review",))
    assert read_texts(lines) == ["one", "two"]
    assert read_texts(table, "review") == ["one, two", "three"]
    with pytest.raises(DataError, match="no column 'text'; it has 'review'"):
        read_texts(table)
    with pytest.raises(DataError, match=r"expected a file ending in .*\.txt"):
        read_texts(tmp_path / "new.pdf")
    lines.write_text("\n")
    with pytest.raises(DataError, match="holds no texts"):
        read_texts(lines)
