"""Prediction gathers what the model gives, row by row, and compiles once for each shape."""

import digits_task as task
import jax
import numpy as np
import pytest

from jtl import sharding
from jtl.outputs import _forward, mean_loss, outputs, predict


@pytest.fixture(scope="module")
def fields():
    return task.data()[1]


def expected(fields):
    """The MLP in NumPy: features and logits."""
    p, s = (jax.tree.map(np.asarray, task.model().variables[name]) for name in ("params", "batch_stats"))
    x = np.maximum(fields["image"] @ p["first"]["kernel"] + p["first"]["bias"], 0)
    x = (x - s["norm"]["mean"]) / np.sqrt(s["norm"]["var"] + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    return x, x @ p["head"]["out"]["kernel"] + p["head"]["out"]["bias"]


def test_every_real_row_in_order(fields):
    logits, labels = predict(task.model(), task.evaluation_batches(fields))
    np.testing.assert_array_equal(labels, fields["label"])
    np.testing.assert_allclose(logits, expected(fields)[1], rtol=1e-4, atol=1e-5)


def test_features_taps_and_fields(fields):
    found = outputs(task.model(), task.evaluation_batches(fields), ("features", "label", "first", "norm"))
    assert list(found) == ["features", "label", "first", "norm"]
    np.testing.assert_allclose(found["features"], expected(fields)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["norm"], found["features"])
    assert found["first"].shape == (297, 32) and found["first"].min() < 0


def test_on_a_mesh(fields):
    devices = sharding.make_mesh()
    model = jax.device_put(task.model(), jax.sharding.NamedSharding(devices, sharding.REPLICATE))
    logits, labels = predict(model, task.evaluation_batches(fields), mesh=devices)
    np.testing.assert_array_equal(labels, fields["label"])
    np.testing.assert_allclose(logits, expected(fields)[1], rtol=1e-4, atol=1e-5)


def test_one_compilation_a_shape_for_equal_static_models(fields):
    batches = task.evaluation_batches(fields)
    predict(task.model(), batches)
    compiled = _forward._cache_size()
    first, _ = predict(task.model(), batches)
    other, _ = predict(task.model(seed=1), batches)
    assert _forward._cache_size() == compiled and (first != other).any()
    short = [{name: rows[:32] for name, rows in batches[0].items()}]
    predict(task.model(), short * 3)
    assert _forward._cache_size() == compiled + 1


def test_errors(fields):
    batches = task.evaluation_batches(fields)
    with pytest.raises(KeyError, match=r"gives no 'feature': .*near misses: \['features'"):
        outputs(task.model(), batches, ("feature",))
    with pytest.raises(KeyError, match="'label'.*near misses"):
        predict(task.model(), [{"image": batches[0]["image"]}])
    with pytest.raises(ValueError, match="no batches"):
        predict(task.model(), [])
    ragged = [{"image": np.zeros((8, 64), np.float32), "ids": np.zeros((8, 4, n), np.int32)} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"'ids' has rows of shapes \[\(4, 2\), \(4, 3\)\]"):
        outputs(task.model(), ragged, ("ids",))


def test_rows_come_in_the_order_of_the_data_set(fields):
    """Whatever the order of batches, their padding and their lengths."""
    order = np.random.default_rng(0).permutation(40)
    sequences = [np.arange(1, 2 + i % 5, dtype=np.float32) for i in range(40)]
    batches = []
    for rows in np.array_split(order, 7):
        length = max(len(sequences[i]) for i in rows)
        ids = np.stack([np.pad(sequences[i], (0, length - len(sequences[i]))) for i in rows])
        batches.append(
            {"image": fields["image"][rows], "ids": ids, "index": rows, "weight": np.ones(len(rows))}
        )
        batches[-1]["weight"][-1] = 0  # padding
    real = np.sort(np.concatenate([batch["index"][:-1] for batch in batches]))
    found = outputs(task.model(), batches, ("logits", "ids", "index"))
    np.testing.assert_array_equal(found["index"], real)
    np.testing.assert_allclose(found["logits"], expected(fields)[1][real], rtol=1e-4, atol=1e-5)
    assert found["ids"].shape == (len(real), 5)
    for row, i in zip(found["ids"], real, strict=True):
        np.testing.assert_array_equal(row[: len(sequences[i])], sequences[i])
        assert not row[len(sequences[i]) :].any()


def test_mean_loss_is_that_of_all_rows(fields):
    from jtl.loss import Loss
    from jtl.tasks import Classify

    class Counted(Classify):
        def value(self, model, outputs, batch, key):
            value, metrics = super().value(model, outputs, batch, key)
            return value, {**metrics, "rows": batch["weight"].sum()}

    assert issubclass(Counted, Loss)
    logits = expected(fields)[1].astype(np.float64)
    whole = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    batches = task.evaluation_batches(fields)  # the last is padded
    mean, count = mean_loss(Counted(), task.model(), batches, weight="rows")
    assert count == len(fields["label"])
    np.testing.assert_allclose(mean, -whole[np.arange(len(whole)), fields["label"]].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        mean_loss(Classify(), task.model(), [])
