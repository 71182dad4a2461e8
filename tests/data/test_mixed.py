"""Batches of several domains: whose rows they hold, what they hide, and how parts of unlike length meet."""

import json

import numpy as np
import pytest

from jtl.data import DataError, SideBySide, image, shift
from jtl.data.batches.loader import Batches, loader
from jtl.data.encode.text import Texts

GREY = image.Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,))
COLOUR = image.Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def texts(lengths, start=1000, pad_id=7):
    """Text i is the token ``start + i``, repeated."""
    lengths = np.asarray(lengths)
    return Texts(
        tokens=np.repeat(start + np.arange(len(lengths)), lengths).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.arange(len(lengths)) % 3,
        pad_id=pad_id,
        max_length=80,
        cut=np.zeros(len(lengths), bool),
    )


def images(count, channels=1, preprocess=COLOUR):
    pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8, channels), np.uint8)
    rows = [{"image": one, "label": i % 3} for i, one in enumerate(pixels)]
    return image.prepare(rows, preprocess)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_rows_of_every_part():
    source, target = Batches(images(20), 4), Batches(images(30, 3), 6)
    batch = SideBySide([source, target])[2]
    assert batch["domain"].tolist() == [0] * 4 + [1] * 6 and batch["domain"].dtype == np.int32
    assert batch["image"].shape == (10, 8, 8, 3)  # grey and colour, normalised for one model
    first, second = source[2], target[2]
    for name in ("image", "weight", "index"):
        np.testing.assert_array_equal(batch[name], np.concatenate([first[name], second[name]]))
    assert batch["label"].tolist() == first["label"].tolist() + [-1] * 6
    assert {name: batch[name].dtype for name in ("label", "index", "weight")} == {
        "label": np.int32, "index": np.int32, "weight": np.float32
    }  # fmt: skip
    assert second["label"].min() >= 0  # the parts are as they were


def test_labels_of_domain_generalisation():
    parts = [Batches(images(count), 4) for count in (8, 12, 16)]
    batch = SideBySide(parts, hide_labels=False)[0]
    assert batch["label"].tolist() == [label for part in parts for label in part[0]["label"]]
    assert batch["domain"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_shorter_part_begins_again():
    short, long = Batches(images(8), 4), Batches(images(20), 4)
    mixed = SideBySide((long, short))
    assert len(mixed) == 5 and len(list(mixed)) == 5
    taken = [batch["index"][4:].tolist() for batch in mixed]
    assert taken[0] == taken[2] == taken[4] and taken[1] == taken[3]
    # with epochs enough, each time through it has another order
    mixed = SideBySide((long, Batches(images(8), 4, epochs=3)))
    taken = [batch["index"][4:].tolist() for batch in mixed]
    assert len(mixed) == 6 and sorted(taken[0] + taken[1]) == sorted(taken[2] + taken[3]) == list(range(8))
    assert taken[:2] != taken[2:4]
    with pytest.raises(IndexError, match="step 6 of 6"):
        mixed[6]


def test_texts_are_padded_to_the_longer_part():
    lengths = np.arange(1, 9)
    batch = SideBySide(
        [Batches(texts(lengths), 8, buckets=(8,)), Batches(texts(2 * lengths, 2000), 8, buckets=(16,))]
    )[0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (16, 16)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int32
    for row, (ids, mask, index) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["index"], strict=True)
    ):
        token, length = (1000 + index, index + 1) if row < 8 else (2000 + index, 2 * index + 2)
        assert ids.tolist() == [token] * length + [7] * (16 - length)
        assert mask.tolist() == [1] * length + [0] * (16 - length)


def test_evaluation_weighs_the_filling_nothing():
    mixed = SideBySide([Batches(images(5), 4, train=False), Batches(images(7), 4, train=False)])
    assert [batch["weight"].sum() for batch in mixed] == [8, 4]
    assert sorted(int(i) for batch in mixed for i in batch["index"][:4] if i >= 0) == list(range(5))


@pytest.mark.parametrize("stop", [0, 3, 9])
def test_the_loader_reads_and_resumes(stop):
    mixed = SideBySide([Batches(images(40), 4, seed=3), Batches(images(12), 4, epochs=2)])
    whole = list(loader(mixed))
    assert len(whole) == 10
    for step, batch in enumerate(whole):
        same(batch, mixed[step])
    iterator = iter(loader(mixed))
    for _ in range(stop):
        next(iterator)
    resumed = iter(loader(mixed, threads=1))
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    rest = list(resumed)
    assert len(rest) == 10 - stop
    for expected, found in zip(whole[stop:], rest, strict=True):
        same(expected, found)


def test_processes_share_every_part():
    def mixed(index, count):
        return SideBySide(
            [Batches(images(16), 4, process_index=index, process_count=count) for _ in range(2)]
        )

    expected, parts = mixed(0, 1)[1], [mixed(i, 2)[1] for i in (0, 1)]
    for domain in (0, 1):
        found = [index for part in parts for index in part["index"][part["domain"] == domain]]
        assert found == expected["index"][expected["domain"] == domain].tolist()


def test_a_shifted_split_is_a_domain():
    rows = [{"image": np.full((8, 8, 1), 10 * i, np.uint8), "label": i % 3} for i in range(8)]
    turned = shift.Shifted(rows, lambda pixels, place: 255 - pixels)
    parts = [Batches(image.prepare(one, COLOUR), 4) for one in (rows, turned)]
    batch = SideBySide(parts)[0]
    np.testing.assert_allclose(batch["image"][:4], -batch["image"][4:], atol=1e-6)


def test_parts_that_do_not_fit():
    with pytest.raises(DataError, match="no parts to mix"):
        SideBySide([])
    with pytest.raises(DataError, match=r"'image' have the shapes \(8, 8, 3\) and \(8, 8, 1\); prepare"):
        SideBySide([Batches(images(8), 4), Batches(images(8, preprocess=GREY), 4)])[0]
    with pytest.raises(DataError, match="parts have the fields .*'image'.* and .*'input_ids'"):
        SideBySide([Batches(images(8), 4), Batches(texts([1] * 8), 4)])[0]
    with pytest.raises(
        DataError, match=r"parts pad with the tokens \[0, 7\]; encode them with one tokenizer"
    ):
        SideBySide([Batches(texts([1] * 8), 4), Batches(texts([1] * 8, pad_id=0), 4)])[0]
