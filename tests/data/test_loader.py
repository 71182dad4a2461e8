"""Plans, resumption, process shares, and what batches hold."""

import json

import numpy as np
import pytest

from jtl.data import DataError
from jtl.data.batches.loader import Batches, evaluation_plan, loader, padding_waste, plan
from jtl.data.encode.text import Texts

LENGTHS = np.random.default_rng(0).integers(3, 73, 1003)
BUCKETS = (16, 32, 48, 64, 80)


def texts(lengths=LENGTHS):
    """Text i is the token i, repeated."""
    return Texts(
        tokens=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.arange(len(lengths)) % 7,
        pad_id=9999,
        max_length=80,
        cut=np.zeros(len(lengths), bool),
    )


def test_plan_takes_every_example_once():
    batches = plan(LENGTHS, 8, BUCKETS, seed=1, epoch=0, window=5)
    rows = np.concatenate([indices for indices, _ in batches])
    assert len(batches) == 125 and all(len(indices) == 8 for indices, _ in batches)
    assert len(rows) == len(set(rows)) == 1000


def test_plan_pads_to_the_smallest_bucket():
    for indices, length in plan(LENGTHS, 8, BUCKETS, 1, 0, window=5):
        longest = LENGTHS[indices].max()
        assert length == min(bucket for bucket in BUCKETS if bucket >= longest)
    assert {length for _, length in plan(np.array([90, 5]), 1, BUCKETS, 0, 0)} == {80, 16}


def test_plan_depends_on_seed_and_epoch_only():
    def rows(seed, epoch):
        return np.concatenate([indices for indices, _ in plan(LENGTHS, 8, BUCKETS, seed, epoch)]).tolist()

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(1, 1) and rows(1, 0) != rows(2, 0)
    assert set(rows(1, 0)) != set(rows(1, 1))  # the remainder that is dropped changes too


def test_plan_mixes_lengths_over_the_epoch():
    lengths = [length for _, length in plan(LENGTHS, 8, BUCKETS, 1, 0)]
    assert lengths != sorted(lengths)
    firsts = {length for epoch in range(10) for _, length in plan(LENGTHS, 8, BUCKETS, 1, epoch)[:1]}
    assert len(firsts) > 1


def test_bucketing_wastes_less_than_padding_random_batches():
    batches = plan(LENGTHS, 8, BUCKETS, 1, 0)
    at_random = [(indices, 80) for indices, _ in batches]
    assert padding_waste(LENGTHS, batches) < 1.3 < 2 < padding_waste(LENGTHS, at_random)
    assert padding_waste(np.array([4, 8]), [(np.array([0, 1]), 8)]) == 16 / 12


def test_evaluation_plan_keeps_every_row():
    batches = evaluation_plan(LENGTHS, 8, BUCKETS)
    rows = np.concatenate([indices for indices, _ in batches])
    assert len(batches) == 126
    assert sorted(rows[:1003].tolist()) == list(range(1003)) and rows[1003:].tolist() == [-1] * 5


def test_training_batch():
    batches = Batches(texts(), 8, buckets=BUCKETS)
    batch = batches[3]
    assert {name: (value.shape[0], value.dtype) for name, value in batch.items()} == {
        "input_ids": (8, np.int32), "attention_mask": (8, np.int32), "label": (8, np.int32),
        "weight": (8, np.float32), "index": (8, np.int32),
    }  # fmt: skip
    for ids, mask, label, index in zip(
        batch["input_ids"], batch["attention_mask"], batch["label"], batch["index"], strict=True
    ):
        length = LENGTHS[index]
        assert ids.tolist() == [index] * length + [9999] * (len(ids) - length)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert label == index % 7
    assert batch["weight"].tolist() == [1] * 8


def test_evaluation_batches_weigh_the_filling_nothing():
    batches = Batches(texts(), 8, train=False, buckets=BUCKETS)
    assert len(batches) == batches.steps_per_epoch == 126
    total = np.concatenate([batches[step]["weight"] for step in range(126)])
    assert total.sum() == 1003
    last = batches[125]
    assert last["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert last["index"][3:].tolist() == [-1] * 5 and last["attention_mask"].sum(1).min() > 0


def test_a_few_static_shapes():
    batches = Batches(texts(), 8, epochs=2)
    assert len(batches.lengths) == 4 and batches.lengths[-1] == 72
    assert {batches[step]["input_ids"].shape for step in range(len(batches))} <= {
        (8, n) for n in batches.lengths
    }


@pytest.mark.parametrize("stop", [0, 17, 125, 200])
def test_resumes_at_exactly_the_next_batch(stop):
    batches = Batches(texts(), 8, epochs=2, seed=4)
    whole = list(loader(batches))
    assert len(whole) == 250
    iterator = iter(loader(batches))
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(loader(Batches(texts(), 8, epochs=2, seed=4), threads=1))
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 250 - stop
    for expected, found in zip(whole[stop:], rest, strict=True):
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])


@pytest.mark.parametrize("train", [True, False])
def test_processes_partition_every_batch(train):
    whole = Batches(texts(), 8, train=train)
    shares = [Batches(texts(), 8, train=train, process_index=i, process_count=2) for i in (0, 1)]
    for step in range(len(whole)):
        expected, *parts = whole[step], shares[0][step], shares[1][step]
        for name in expected:
            assert parts[0][name].shape == parts[1][name].shape
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), expected[name])


def test_epochs_differ_and_end():
    batches = Batches(texts(), 8, epochs=2)
    first, second = (
        np.concatenate([batches[epoch * 125 + i]["index"] for i in range(125)]).tolist() for epoch in (0, 1)
    )
    assert first != second and len(set(first)) == len(set(second)) == 1000
    with pytest.raises(IndexError, match="step 250 of 250"):
        batches[250]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=2000), "1003 training examples fill no batch of 2000; choose at most 1003"),
        (dict(batch_size=9, process_count=2), "batch size 9 is no positive multiple of 2 processes"),
        (dict(batch_size=8, process_count=2, process_index=2), "process 2 of 2: out of range"),
        (dict(batch_size=0), "batch size 0"),
        (
            dict(batch_size=8, buckets=(16, 64)),
            "a text has 72 tokens, the longest bucket 64; tokenise with max_length=64",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(DataError, match=message):
        Batches(texts(), **settings)


def test_take():
    part = texts().take(np.array([5, 0, 1002]))
    assert part.lengths.tolist() == LENGTHS[[5, 0, 1002]].tolist()
    assert part.batch(np.array([2, 0]), 80)["input_ids"][:, 0].tolist() == [1002, 5]
    assert part.fingerprint != texts().fingerprint == texts().fingerprint
