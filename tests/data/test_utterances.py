"""Speech with transcripts: what each split holds, your own folders, and public sets."""

import csv
import importlib.util

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy.io import wavfile

from experiments.speech_recognition import accents
from jtl.data import DataError, load
from jtl.data.readers.sound import RATE


def folder(path, texts, rate=RATE, seconds=0.5):
    path.mkdir(parents=True)
    with (path / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i, text in enumerate(texts):
            tone = np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)
            wavfile.write(path / f"{i}.wav", rate, (tone * 2**14).astype(np.int16))
            writer.writerow([f"{i}.wav", text])
    return path


def test_no_speaker_and_no_sentence_is_in_two_splits():
    dataset = accents.accented()
    sentences = {
        s: {one for text in own.texts for one in text.split(". ")} for s, own in dataset.splits.items()
    }
    speakers = {s: set(own.voices) for s, own in dataset.splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not sentences[one] & sentences[other] and not speakers[one] & speakers[other]
    example = dataset.splits["test"][0]
    assert set(example) == {"audio", "text", "voice"} and example["audio"].dtype == np.float32
    assert 5 < len(example["audio"]) / RATE < 40 and len(example["text"].split()) <= accents.MOST["accented"]


def test_own_folders(tmp_path):
    texts = [f"Number {i}." for i in range(60)]
    dataset = load(folder(tmp_path / "one", texts, rate=8000), "speech")
    example = dataset.splits["train"][0]
    assert len(example["audio"]) == RATE // 2 and example["text"] in texts  # resampled
    assert sum(map(len, dataset.splits.values())) == 60 and len(dataset.notes) == 2
    for split in ("train", "dev", "test"):
        folder(tmp_path / "three" / split, [f"{split} {i}" for i in range(3)])
    splits = load(tmp_path / "three", "speech").splits
    assert splits["validation"][2]["text"] == "dev 2" and len(splits["test"]) == 3


def test_refused(tmp_path):
    with pytest.raises(DataError, match="unknown data set 'welsh' of speech: expected tfds:NAME"):
        load("welsh", "speech")
    with pytest.raises(FileNotFoundError, match="no data file or folder at"):
        load(tmp_path / "none", "speech")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match="expected one table, metadata.csv, with the columns file_name and text"
    ):
        load(tmp_path / "empty", "speech")
    own = folder(tmp_path / "own", ["a b", "c d"])
    (own / "1.wav").unlink()
    with pytest.raises(DataError, match=r"names 1 files that are not there, such as .*1\.wav"):
        load(own, "speech")


class Sound(tfds.features.Tensor):
    """The sound feature of TFDS, which cannot be made without TensorFlow."""

    def __init__(self, sample_rate):
        super().__init__(shape=(None,), dtype=np.int64)
        self.sample_rate = sample_rate


class Calls(tfds.core.GeneratorBasedBuilder):
    """Sound and text under LibriSpeech's names of columns and splits."""

    VERSION = tfds.core.Version("1.0.0")
    name = "jtl_calls"

    def _info(self):
        features = {"speech": Sound(8000), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            s: self._generate_examples(s) for s in ("train_clean100", "dev_clean", "test_clean", "test_other")
        }

    def _generate_examples(self, split):
        yield from ((i, {"speech": np.full(80, 2**14, np.int64), "text": f"{split} {i}"}) for i in range(4))


def test_public_speech(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.features, "Audio", Sound)
    Calls(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    splits = load("tfds:jtl_calls", "speech").splits
    assert {split: source[0]["text"][:-2] for split, source in splits.items()} == {
        "train": "train_clean100", "validation": "dev_clean", "test": "test_clean",
    }  # fmt: skip
    sound = splits["train"][0]["audio"]
    assert len(sound) == 160 and sound[60:100] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(DataError, match="a column 'said', it has speech, text"):
        load("tfds:jtl_calls", "speech", text_column="said")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="is about its absence")
def test_sound_of_tfds_needs_tensorflow():
    with pytest.raises(DataError, match="tfds:librispeech: .* needs TensorFlow"):
        load("tfds:librispeech", "speech")
