"""Images made ready: resizing, channels, normalising, augmentation, in memory or not."""

import numpy as np
import pytest

import jtl.data as data
from jtl.data.batches.loader import Batches, loader
from jtl.data.encode.image import Augment, Images, Preprocess, prepare

RGB = Preprocess((8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def source(*shapes):
    rng = np.random.default_rng(0)
    return [
        {"image": rng.integers(0, 256, shape, dtype=np.uint8), "label": i % 3}
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, channels), dtype=np.uint8)
    expected = (pixels.astype(np.float64) / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    found = RGB.normalise(pixels)
    assert found.dtype == np.float32 and found.shape == (2, 5, 4, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_same_size_is_untouched_and_uniform_stays_uniform():
    image = source((8, 8, 3))[0]["image"]
    np.testing.assert_array_equal(RGB.resize(image), image)
    assert np.unique(
        Preprocess((30, 20), (0.5,), (0.5,)).resize(np.full((7, 9, 1), 77, np.uint8))
    ).tolist() == [77]


def test_shortest_side_then_centre():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200  # the centre square
    one = Preprocess((10, 10), (0.5,) * 3, (0.5,) * 3, shortest=10, resample="nearest").resize(image)
    assert one.shape == (10, 10, 3) and np.unique(one).tolist() == [200]
    with pytest.raises(data.DataError, match="shortest side 8 is below the size"):
        Preprocess((10, 10), (0.5,), (0.5,), shortest=8).resize(image)


def test_colour_to_grey_and_bad_images():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    grey = Preprocess((4, 4), (0.0,), (1.0,)).resize(red)
    assert grey.shape == (4, 4, 1) and np.unique(grey).tolist() == [76]  # 0.299 of 255
    with pytest.raises(data.DataError, match=r"expected a uint8 image .* found uint8 \(4, 4, 2\)"):
        RGB.resize(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(ValueError, match="one or three channels"):
        Preprocess((4, 4), (0.5, 0.5), (0.5, 0.5))


def test_in_memory_equals_read_late():
    mixed = source((8, 8, 1), (9, 7, 3), (12, 8, 1), (8, 20, 3))
    kept, late = prepare(mixed, RGB), prepare(mixed, RGB, memory=0)
    assert kept.pixels is not None and late.pixels is None
    for name, value in kept.batch(np.arange(4)).items():
        np.testing.assert_array_equal(late.batch(np.arange(4))[name], value)
    assert late.labels.tolist() == kept.labels.tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(
        kept.take(np.array([3, 1])).batch(np.array([1]))["image"], late.batch(np.array([1]))["image"]
    )


def test_mnist_for_a_colour_model():
    digits = data.load("mnist5k").splits["validation"]
    images = prepare(digits, Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3))
    assert images.pixels.shape == (500, 32, 32, 1)
    batch = next(iter(loader(Batches(images, 16))))
    assert batch["image"].shape == (16, 32, 32, 3) and batch["image"].dtype == np.float32
    assert batch["image"].min() == -1 and 0.9 < batch["image"].max() <= 1
    for index, label in zip(batch["index"], batch["label"], strict=True):
        assert digits[index]["label"] == label


def test_shift_and_flip():
    pixels = np.random.default_rng(0).integers(1, 256, (2, 4, 4, 1), dtype=np.uint8)
    still = np.array([[0.5, 0.5, 0.9]] * 2)
    np.testing.assert_array_equal(Augment(1, flip=True)(pixels, still), pixels)
    up_left = Augment(1)(pixels, np.array([[0.99, 0.99, 0.0]] * 2))
    np.testing.assert_array_equal(up_left[:, :3, :3], pixels[:, 1:, 1:])
    assert not up_left[:, 3].any() and not up_left[:, :, 3].any()
    mirrored = Augment(0, flip=True)(pixels, np.array([[0, 0, 0.1], [0, 0, 0.6]]))
    np.testing.assert_array_equal(mirrored[0], pixels[0, :, ::-1])
    np.testing.assert_array_equal(mirrored[1], pixels[1])


def test_augmentation_is_keyed_and_for_training_only():
    def batches(**settings) -> Batches:
        images = prepare(source(*[(8, 8, 1)] * 12), RGB, Augment(2, flip=True))
        return Batches(images, 4, **settings)

    for step in range(3):
        whole, again = batches(seed=1)[step], batches(seed=1)[step]
        np.testing.assert_array_equal(whole["image"], again["image"])
        halves = [batches(seed=1, process_index=i, process_count=2)[step]["image"] for i in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(halves), whole["image"])
        plain = batches(train=False)[step]
        np.testing.assert_array_equal(
            plain["image"], prepare(source(*[(8, 8, 1)] * 12), RGB).batch(plain["index"])["image"]
        )
    two = batches(seed=1, epochs=2)
    by_index = [dict(zip(two[step]["index"].tolist(), two[step]["image"], strict=True)) for step in range(6)]
    first, second = by_index[0] | by_index[1] | by_index[2], by_index[3] | by_index[4] | by_index[5]
    assert sum(not np.array_equal(first[i], second[i]) for i in range(12)) > 6


def test_fingerprint():
    images = prepare(source((8, 8, 1), (8, 8, 1)), RGB)
    assert isinstance(images, Images)
    assert images.fingerprint == prepare(source((8, 8, 1), (8, 8, 1)), RGB, memory=0).fingerprint
    assert images.fingerprint != images.take(np.array([1, 0])).fingerprint
    with pytest.raises(data.DataError, match="empty split"):
        prepare([], RGB)
