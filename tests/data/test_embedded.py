"""The embedded data sets: literal sizes and class counts, and that nothing leaks between splits."""

import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import jtl.data as data

SIZES = {
    "rotten_tomatoes": (9705, 1046, 2000),
    "newsgroups20": (10136, 1126, 7528),
    "reuters_r8": (4874, 541, 2189),
    "mnist5k": (3500, 500, 1000),
    "uci_digits": (1259, 179, 359),
    "mnist_m": (3500, 500, 1000),
    "rendered_digits": (3040, 500, 1000),
}
CONTENT = {
    "rotten_tomatoes": ["text", "label", "film"],
    "newsgroups20": ["text", "label"],
    "reuters_r8": ["text", "label"],
    "mnist5k": ["image", "label"],
    "uci_digits": ["image", "label"],
    "mnist_m": ["image", "label"],
    "rendered_digits": ["image", "label", "face"],
}


@pytest.fixture(scope="module")
def loaded():
    """Every embedded set, each example read once."""
    sets = {name: data.load(name) for name in data.NAMES}
    read = {
        name: {split: [source[i] for i in range(len(source))] for split, source in one.splits.items()}
        for name, one in sets.items()
    }
    return sets, read


def counts(examples):
    return tuple(count for _, count in sorted(Counter(one["label"] for one in examples).items()))


@pytest.mark.parametrize("name", data.NAMES)
def test_sizes_and_fields(loaded, name):
    sets, read = loaded
    assert tuple(sets[name].splits) == ("train", "validation", "test")
    assert tuple(map(len, read[name].values())) == SIZES[name]
    for examples in read[name].values():
        assert list(examples[0]) == CONTENT[name]
        assert {one["label"] for one in examples} == set(range(len(sets[name].classes)))


@pytest.mark.parametrize("name", data.NAMES)
def test_no_example_in_two_splits(loaded, name):
    _, read = loaded
    field = CONTENT[name][0]
    content = {
        split: {one[field].lower() if field == "text" else one[field].tobytes() for one in examples}
        for split, examples in read[name].items()
    }
    assert not content["train"] & content["validation"]
    assert not content["train"] & content["test"]
    assert not content["validation"] & content["test"]
    assert len(content["train"]) == SIZES[name][0]  # nor twice in train


def test_rotten_tomatoes(loaded):
    sets, read = loaded
    splits = read["rotten_tomatoes"]
    assert sets["rotten_tomatoes"].classes == ("rotten", "fresh")
    assert [counts(splits[split]) for split in splits] == [(4188, 5517), (402, 644), (793, 1207)]
    films = {split: {one["film"] for one in examples} for split, examples in splits.items()}
    assert [len(films[split]) for split in films] == [383, 44, 80]
    assert len(set.union(*films.values())) == 383 + 44 + 80
    by_text = {one["text"]: one for examples in splits.values() for one in examples}
    assert by_text["Compulsively watchable, no matter how degraded things get."] == {
        "text": "Compulsively watchable, no matter how degraded things get.",
        "label": 1,
        "film": "el_crimen_del_padre_amaro",
    }
    assert by_text["Two-bit potboiler."]["label"] == 0
    assert not any("&amp;" in text or "\n" in text or text != text.strip() for text in by_text)


def test_newsgroups(loaded):
    sets, read = loaded
    test = counts(read["newsgroups20"]["test"])
    assert sets["newsgroups20"].classes[0] == "alt.atheism"
    assert test == (
        319, 389, 394, 392, 385, 392, 390, 395, 398, 397, 399, 396, 393, 396, 394, 398, 364, 376, 310, 251
    )  # fmt: skip
    assert all(one["text"].replace(" ", "").isalpha() for one in read["newsgroups20"]["train"][:100])


def test_reuters(loaded):
    sets, read = loaded
    splits = read["reuters_r8"]
    assert sets["reuters_r8"].classes == (
        "acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"
    )  # fmt: skip
    assert counts(splits["train"]) == (1432, 221, 2551, 37, 151, 172, 95, 215)
    assert counts(splits["validation"]) == (159, 24, 284, 4, 17, 19, 10, 24)
    assert counts(splits["test"]) == (696, 121, 1083, 10, 81, 87, 36, 75)


def test_mnist(loaded):
    _, read = loaded
    splits = read["mnist5k"]
    assert [counts(splits[split]) for split in splits] == [(350,) * 10, (50,) * 10, (100,) * 10]
    images = np.stack([one["image"] for one in splits["train"]])
    assert images.shape == (3500, 28, 28, 1) and images.dtype == np.uint8
    assert images.max() == 255 and 0.12 < images.mean() / 255 < 0.14  # MNIST's mean is 0.1307
    ones, zeros = (np.mean([one["image"] for one in splits["train"] if one["label"] == k]) for k in (1, 0))
    assert ones < 0.6 * zeros  # a one takes less ink, so labels and images belong together


def test_uci_digits(loaded):
    from sklearn.datasets import load_digits

    _, read = loaded
    theirs = {(digit, (image * 255 / 16).round().astype(np.uint8).tobytes())
              for digit, image in zip(load_digits().target, load_digits().images, strict=True)}  # fmt: skip
    ours = {(one["label"], one["image"].tobytes()) for part in read["uci_digits"].values() for one in part}
    assert ours == theirs


def patches_under(blended, paper):
    """Patches of the photographs that equal ``blended`` on ``paper``: those on tiles of train, and on the others."""
    from sklearn.datasets import load_sample_images

    found = {True: [], False: []}
    y, x = np.argwhere(paper)[0]
    for photo in load_sample_images().images:
        for row, column in np.ndindex(7, 10):
            tile = photo[61 * row :, 61 * column :][:61, :61]
            like = (tile[y:, x:][:34, :34] == blended[y, x]).all(-1)
            patches = [tile[top:, left:][:28, :28] for top, left in np.argwhere(like)]
            same = [patch for patch in patches if (patch[paper] == blended[paper]).all()]
            found[(row + column) % 3 != 0] += same
    return found[True], found[False]


@pytest.mark.parametrize(("split", "label"), [("train", 7), ("test", 1)])
def test_mnist_m_is_a_patch_less_a_digit(loaded, split, label):
    """Under each image lies one patch, on its split's side of the board, and a digit of its split and class."""
    _, read = loaded
    digits = np.stack([one["image"] for one in read["mnist5k"][split] if one["label"] == label]).astype(int)
    paper = (digits == 0).all((0, 3))  # where no digit of the class has ink, a blend is its patch
    assert paper.sum() > 20
    blends = [one["image"] for one in read["mnist_m"][split] if one["label"] == label]
    assert blends[0].shape == (28, 28, 3) and blends[0].dtype == np.uint8
    for blended in blends[:5]:
        on_train, elsewhere = patches_under(blended, paper)
        here, there = (on_train, elsewhere) if split == "train" else (elsewhere, on_train)
        assert len(here) == 1 and not there
        assert (np.abs(here[0].astype(int) - digits) == blended).all((1, 2, 3)).sum() == 1


def test_mnist_m_has_the_labels_of_mnist(loaded):
    _, read = loaded
    for split, examples in read["mnist_m"].items():
        assert counts(examples) == counts(read["mnist5k"][split])


def test_rendered_digits(loaded):
    _, read = loaded
    splits = read["rendered_digits"]
    assert [counts(splits[split]) for split in splits] == [(304,) * 10, (50,) * 10, (100,) * 10]
    faces = {split: {one["face"] for one in examples} for split, examples in splits.items()}
    assert [len(faces[split]) for split in splits] == [16, 2, 4]
    assert len(set.union(*faces.values())) == 22
    families = {split: {face.split("-")[0][:6] for face in faces[split]} for split in splits}
    assert not families["train"] & families["test"]
    images = np.stack([one["image"] for one in splits["train"]])
    assert images.shape == (3040, 28, 28, 1) and images.dtype == np.uint8
    assert np.quantile(images.max((1, 2, 3)), 0.05) > 150 and 0.05 < images.mean() / 255 < 0.15
    rim = np.concatenate([images[:, [0, -1]].reshape(3040, -1), images[:, :, [0, -1]].reshape(3040, -1)], 1)
    assert (rim.max(1) > 60).mean() < 0.005  # hardly any digit is cut off
    # In every face a one takes less ink than an eight: labels and images belong together, and no face lacks digits.
    for examples in splits.values():
        for face in {one["face"] for one in examples}:
            ink = [
                np.mean([one["image"] for one in examples if one["face"] == face and one["label"] == k])
                for k in (1, 8)
            ]
            assert 0 < ink[0] < ink[1]


@pytest.mark.slow
def test_made_digits_are_the_same_each_time(loaded, tmp_path):
    from jtl.data.sets.builders import EMBEDDED

    _, read = loaded
    for name in ("mnist_m", "rendered_digits"):
        again = EMBEDDED[name](data_dir=tmp_path, file_format="array_record").rows()
        for split, rows in again.items():
            made = {(int(row["label"]), np.asarray(Image.open(row["image"])).tobytes()) for row in rows}
            assert made == {(one["label"], one["image"].tobytes()) for one in read[name][split]}


def test_rendered_digits_need_matplotlib(monkeypatch):
    from jtl.data.sets.digits import font_folder

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(data.DataError, match="pip install matplotlib"):
        font_folder("rendered_digits")


def test_description(loaded):
    sets, _ = loaded
    assert str(sets["mnist5k"]).startswith(
        "mnist5k (image, 10 classes; train 3500, validation 500, test 1000); MNIST (LeCun, Cortes & Burges)"
    )
    assert sets["mnist5k"].version == "mnist5k/1.0.0"


def test_plots_are_there_and_unlabelled():
    from jtl.data.sets.builders import rotten_tomatoes_rows

    assert Counter(category for category, _, _ in rotten_tomatoes_rows()) == {
        "fresh": 7403, "rotten": 5405, "plot": 1097
    }  # fmt: skip
