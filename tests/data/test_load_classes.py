"""Data sets whose splits hold different classes: embedded, by topic, at random and by folder."""

import numpy as np
import pytest
from PIL import Image

from jtl import data
from jtl.data.sets.few_shot import Joined


def classes(dataset):
    return {
        split: {dataset.classes[i] for i in np.unique(data.labels(s))} for split, s in dataset.splits.items()
    }


def test_newsgroups_by_topic():
    loaded = data.load_classes("newsgroups20")
    own = classes(loaded)
    assert {name.split(".")[0] for name in own["train"]} == {"rec", "sci"}
    assert {name.split(".")[0] for name in own["validation"]} == {"comp"}
    assert [len(own[split]) for split in own] == [8, 5, 7]
    assert sum(map(len, loaded.splits.values())) == 10136 + 1126 + 7528  # every post
    texts = [loaded.splits["test"][i] for i in range(0, len(loaded.splits["test"]), 900)]
    assert {loaded.classes[one["label"]] for one in texts} <= own["test"]


def test_other_sets_by_seed():
    found = [classes(data.load_classes("uci_digits", seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert [len(found[0][split]) for split in found[0]] == [6, 2, 2]
    assert len(set.union(*found[0].values())) == 10
    assert sum(map(len, data.load_classes("uci_digits").splits.values())) == 1797


def folder(path, parts):
    for split, names in parts.items():
        for k, name in enumerate(names):
            (path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((5, 5), 40 * k + i, np.uint8)).save(path / split / name / f"{i}.png")
    return path


def test_a_folder_of_splits_with_classes_of_their_own(tmp_path):
    loaded = data.load_classes(folder(tmp_path, {"train": "abcdefg", "test": "xyz"}))
    own = classes(loaded)
    assert own["test"] == set("xyz") and len(own["validation"]) == 1
    assert own["train"] | own["validation"] == set("abcdefg")
    for split, source in loaded.splits.items():
        assert len(source) == 4 * len(own[split])
        for one in (source[i] for i in range(len(source))):
            name = loaded.classes[one["label"]]
            assert one["image"].min() // 40 == (
                "abcdefg".find(name) if name in "abcdefg" else "xyz".find(name)
            )


def test_a_class_in_two_folders_is_refused(tmp_path):
    with pytest.raises(data.DataError, match=r"test shares the classes \['b'\] with another split"):
        data.load_classes(folder(tmp_path, {"train": "abc", "test": "bx"}))


def test_unknown_names_are_refused_as_by_load():
    with pytest.raises(data.DataError, match="unknown data set 'glyfs'"):
        data.load_classes("glyfs")


def test_joined():
    joined = Joined(([{"label": 3}, {"label": 1}], [{"label": 0}]))
    assert len(joined) == 3
    assert [joined[i]["label"] for i in range(3)] == joined.labels.tolist() == [3, 1, 0]
