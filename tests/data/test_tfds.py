"""Public sets through TensorFlow Datasets: prepared sets on disk are read; nothing here reaches a network."""

import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

import jtl.data as data
from jtl.data import DataError, load


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A text set of the glue kind: no supervised keys, a test split without labels."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True
    name = "jtl_reviews"

    def _info(self):
        features = {
            "sentence": tfds.features.Text(),
            "author": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        sizes = {"train": 300, "validation": 40, "test": 40}
        return {split: self._generate_examples(size, i) for i, (split, size) in enumerate(sizes.items())}

    def _generate_examples(self, count, seed):
        for i in range(count):
            label = -1 if seed == 2 else i % 2
            yield i, {"sentence": f"né {seed} {i}", "author": "me", "label": label}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def reviews(folder):
    Reviews(data_dir=folder, file_format="array_record").download_and_prepare()


def test_unlabelled_test_and_missing_validation(reviews):
    one = load("tfds:jtl_reviews", text_column="sentence")
    assert one.kind == "text" and one.classes == ("bad", "good") and one.version == "jtl_reviews/1.0.0"
    assert {split: len(source) for split, source in one.splits.items()} == {
        "train": 270,
        "validation": 30,
        "test": 40,
    }
    assert one.notes == (
        "the test split is not labelled",
        "no labelled test split: validation is test",
        "no validation split: 30 of 300 examples of train became it, chosen by hash",
    )
    example = one.splits["test"][0]
    assert example["text"].startswith("né 1 ") and example["author"] == "me" and example["label"] in (0, 1)
    texts = [{source[i]["text"] for i in range(len(source))} for source in one.splits.values()]
    assert len(set.union(*texts)) == 340
    assert np.bincount(data.labels(one.splits["validation"])).tolist() == [15, 15]


def test_columns(reviews):
    with pytest.raises(
        DataError, match=r"which is the text column\? Choose with --text-column; it has sentence \(Text\)"
    ):
        load("tfds:jtl_reviews")
    with pytest.raises(DataError, match="no text column 'body'; it has .*sentence"):
        load("tfds:jtl_reviews", text_column="body")
    with pytest.raises(DataError, match="no label column 'author'"):
        load("tfds:jtl_reviews", text_column="sentence", label_column="author")


def test_image_set(folder):
    from jtl.data.sets.builders import UciDigits

    UciDigits(data_dir=folder, file_format="array_record").download_and_prepare()
    one = load("tfds:uci_digits")  # by its supervised keys
    ours = data.load("uci_digits")
    assert one.kind == "image" and one.classes == ours.classes
    for split in one.splits:
        assert len(one.splits[split]) == len(ours.splits[split])
        np.testing.assert_array_equal(one.splits[split][5]["image"], ours.splits[split][5]["image"])


def test_unknown_names(folder):
    with pytest.raises(DataError, match="TensorFlow Datasets has no 'mnistt'; did you mean mnist or"):
        load("tfds:mnistt")
    with pytest.raises(DataError, match="tfds:glue/sst3: unknown config; there are cola, sst2, mrpc"):
        load("tfds:glue/sst3")


def test_unreachable_network_fails_at_once(folder, monkeypatch):
    def no_network(*args):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ConnectionError, match="tfds:mnist has to be downloaded, but .* set TFDS_DATA_DIR"):
        load("tfds:mnist")


def test_files_gone(folder, reviews):
    for path in (folder / "jtl_reviews/1.0.0").glob("*train*"):
        path.unlink()
    with pytest.raises(
        DataError, match="tfds:jtl_reviews could not be prepared without TensorFlow in .*No such file"
    ):
        load("tfds:jtl_reviews", text_column="sentence")
