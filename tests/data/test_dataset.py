"""Cutting data sets: nested stratified subsets, splits by hash, and label checks."""

from collections import Counter

import numpy as np
import pytest

from jtl.data import DataError, labels, subset, subset_indices
from jtl.data.dataset import Subset, carve, check_labels, stable_hash

LABEL = np.repeat([0, 1, 2], [600, 380, 20])


def test_subsets_are_nested_and_stratified():
    small, middle, large = (subset_indices(LABEL, n, seed=3) for n in (16, 64, 256))
    assert middle[:16].tolist() == small.tolist() and large[:64].tolist() == middle.tolist()
    assert len(set(large.tolist())) == 256
    # proportional would be 153.6, 97.28, 5.12
    assert Counter(LABEL[large].tolist()) == {0: 154, 1: 97, 2: 5}
    assert set(LABEL[subset_indices(LABEL, 3, seed=0)]) == {0, 1, 2}


def test_subsets_depend_on_the_seed_only():
    assert subset_indices(LABEL, 64, 1).tolist() == subset_indices(LABEL, 64, 1).tolist()
    assert set(subset_indices(LABEL, 64, 1)) != set(subset_indices(LABEL, 64, 2))
    assert sorted(subset_indices(LABEL, len(LABEL), 5)) == list(range(len(LABEL)))


@pytest.mark.parametrize("n", [2, 1001])
def test_impossible_subset(n):
    with pytest.raises(
        DataError, match=f"cannot draw {n} examples out of 1000 of 3 classes: ask for 3 to 1000"
    ):
        subset_indices(LABEL, n, 0)


def test_subset_of_a_subset():
    source = [{"text": str(i), "label": int(label)} for i, label in enumerate(LABEL)]
    half = Subset(source, np.arange(1, 1000, 2))
    drawn = subset(half, 9, 0)
    assert [one["label"] for one in (drawn[i] for i in range(9))] == labels(drawn).tolist()
    assert all(int(drawn[i]["text"]) % 2 == 1 for i in range(9))


def test_carve_keeps_equal_keys_together_and_proportions():
    keys = [f"text {i % 900}" for i in range(1000)]
    rest, carved = carve(keys, 0.1, LABEL)
    assert not {keys[i] for i in rest} & {keys[i] for i in carved}
    assert sorted([*rest, *carved]) == list(range(1000))
    assert 80 <= len(carved) <= 120
    # adding rows moves few others: the hash decides, not the position
    assert len({keys[i] for i in carved} ^ {keys[i] for i in carve(keys[:-50], 0.1, LABEL[:-50])[1]}) < 20


def test_stable_hash_is_sha256():
    assert stable_hash("abc") == 0xBA7816BF8F01CFEA


def test_label_checks():
    check_labels([0, 1], ("a", "b"), "train", "here")
    check_labels([0], ("a", "b"), "test", "here")
    with pytest.raises(
        DataError, match=r"split test has label 2 \(example 1\) out of range: the 2 classes of train"
    ):
        check_labels([0, 2], ("a", "b"), "test", "here")
    with pytest.raises(DataError, match="label -1"):
        check_labels([-1, 0, 1], ("a", "b"), "train", "here")
    with pytest.raises(DataError, match="train has no example of class 'b'"):
        check_labels([0, 2], ("a", "b", "c"), "train", "here")
    with pytest.raises(DataError, match="here: split validation is empty"):
        check_labels([], ("a",), "validation", "here")
