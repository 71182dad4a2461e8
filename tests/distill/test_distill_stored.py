"""Teachers computed once: what is stored belongs to the rows, and to the views of them, that a student sees."""

import jax
import numpy as np
import optax
import pytest

from jtl import distill, heads
from jtl.data import image
from jtl.data.batches.loader import Batches
from jtl.model import linen
from jtl.models.conv4 import Conv4
from jtl.outputs import outputs
from jtl.tasks import Classify
from jtl.train import make_step

HOW = image.Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 16, 16, 1), dtype=np.uint8)
    rows = [{"image": picture, "label": i % 3} for i, picture in enumerate(pixels)]
    return image.Images(rows, HOW, pixels, np.arange(10) % 3, image.Augment(shift=3))


def net(seed):
    module = Conv4(4)
    body = linen(module, jax.jit(module.init)(jax.random.key(seed), np.zeros((2, 16, 16, 1), np.float32)))
    return heads.classifier(body, 3, key=jax.random.key(seed), on="features", width=4)


def stored(teacher, split):
    return distill.columns(outputs(teacher, Batches(split, 4, train=False), ("logits",)))


def test_views_differ_and_each_is_the_same_whenever_it_is_read(split):
    views = distill.Views(split, 3, seed=5)
    assert len(views) == len(views.lengths) == 30 and views.buckets == split.buckets
    again = views.batch(np.array([14]), 1)
    all_rows = views.batch(np.arange(30), 1, np.zeros((30, 3)))
    np.testing.assert_array_equal(again["image"][0], all_rows["image"][14])
    np.testing.assert_array_equal(all_rows["label"], np.tile(split.known_labels, 3))
    assert (all_rows["image"][4] != all_rows["image"][14]).any()
    other = distill.Views(split, 3, seed=6).batch(np.arange(30), 1)["image"]
    assert (other != all_rows["image"]).any()


def test_a_stored_teacher_teaches_as_a_live_one_does(split):
    teacher, student = net(0), net(1)
    views = distill.Views(split, 2)
    taught = distill.Taught(views, stored(teacher, views))
    batches = Batches(taught, 4, seed=3, epochs=2)
    assert len(batches) == 10
    live = distill.Distill(teacher, Classify() + distill.SoftTargets())
    compute = jax.jit(lambda loss, batch: loss(student, batch, None)[0])
    for batch in (batches[0], batches[9]):
        cached = compute(Classify() + distill.SoftTargets(), batch)
        bare = {name: rows for name, rows in batch.items() if name != "teacher_logits"}
        np.testing.assert_allclose(cached, compute(live, bare), rtol=1e-5)
    step = make_step(Classify() + distill.SoftTargets(), optax.sgd(0.1))
    state, metrics = step(step.init(student, jax.random.key(0)), batches[0])
    assert np.isfinite(metrics["loss"])


def test_outputs_of_other_rows_are_refused(split):
    with pytest.raises(ValueError, match="for 10 rows, the split has 20"):
        distill.Taught(distill.Views(split, 2), stored(net(0), split))
