"""Texts with summaries: where they come from, and their rows of tokens."""

import csv

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.docstring_summaries import PACKAGES
from jtl import pretrained
from jtl.data import DataError, load
from jtl.data.encode.pairs import encode
from jtl.tasks import teacher_forcing


def write(path, rows, columns=("text", "summary")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_your_own_table(tmp_path):
    rows = [(f"A long text {i}, with a comma", f"short {i}") for i in range(40)]
    dataset = load(write(tmp_path / "my.csv", rows), "summaries")
    assert dataset.kind == "summary" and {s: len(own) for s, own in dataset.splits.items()} == {
        "train": 29, "validation": 3, "test": 8,
    }  # fmt: skip
    one = dataset.splits["train"][0]
    assert one["text"].startswith("A long text") and one["summary"] == f"short {one['text'].split()[3][:-1]}"
    other = write(tmp_path / "other.csv", rows, ("document", "line"))
    assert len(load(other, "summaries", text_column="document", summary_column="line").splits["test"]) == 8
    with pytest.raises(DataError, match="other.csv, line 2: no column 'text'; it has 'document', 'line'"):
        load(other, "summaries")
    with pytest.raises(DataError, match="line 3: 'summary' should be a text, found ' '"):
        load(write(tmp_path / "blank.csv", [("a", "b"), ("a", " ")]), "summaries")
    with pytest.raises(FileNotFoundError, match="no data file or folder at"):
        load(tmp_path / "none.csv", "summaries")
    with pytest.raises(DataError, match="unknown data set 'xsum' of summaries"):
        load("xsum", "summaries")
    with pytest.raises(DataError, match="expected a file ending in .csv"):
        load(write(tmp_path / "my.txt", rows), "summaries")


class News(tfds.core.GeneratorBasedBuilder):
    """Of XSum's columns."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True
    name = "jtl_news"

    def _info(self):
        features = {"document": tfds.features.Text(), "summary": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("document", "summary"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split):
        yield from ((i, {"document": f"né in {split} {i}", "summary": "é"}) for i in range(4))


def test_public_summaries(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    News(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = load("tfds:jtl_news", "summaries")
    assert dataset.splits["test"][0]["text"].startswith("né in test") and not dataset.notes
    assert dataset.splits["test"][0]["summary"] == "é"
    with pytest.raises(DataError, match="no summary column 'line'; it has document, summary"):
        load("tfds:jtl_news", "summaries", summary_column="line")


def test_no_package_is_in_two_splits():
    packages = [package for own in PACKAGES.values() for package in own]
    assert len(set(packages)) == len(packages)


# --- rows of tokens --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.tokenizer("smollm2")


ROWS = [
    {"text": "One two three four five six.", "summary": "Count to six."},
    {"text": "Yes.", "summary": "Agree with all that was said before in so many words."},
]


def test_a_causal_row_is_the_prompt_and_the_answer(tokenizer):
    pairs = encode(ROWS, tokenizer, prompt="Text: {text}\nSummary:", max_answer=6)
    batch = pairs.batch(np.array([0, 1]), 24)
    texts = [
        tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    end = tokenizer.eos_token
    assert texts[0] == f"Text: One two three four five six.\nSummary: Count to six.{end}"
    assert texts[1] == f"Text: Yes.\nSummary: Agree with all that was{end}"  # six tokens, the end among them
    for row in range(2):
        predicted = np.flatnonzero(batch["continuation"][row]) + 1
        said = tokenizer.decode(batch["input_ids"][row, predicted])
        assert said == texts[row].split("Summary:")[1]
    prompts = pairs.prompt(np.array([1, 0]), 20)
    first = prompts["input_ids"][0][prompts["attention_mask"][0] == 1]
    assert tokenizer.decode(first) == "Text: Yes.\nSummary:" and len(first) == pairs.prompt_lengths[1]
    np.testing.assert_array_equal(pairs.lengths, batch["attention_mask"].sum(1))


def test_long_texts_lose_their_end_and_the_prompt_stays(tokenizer):
    pairs = encode(ROWS, tokenizer, prompt="<|im_start|>user\n{text}<|im_end|>\n", max_text=4)
    assert tokenizer.decode(pairs.prompts[0]) == "<|im_start|>user\nOne two three four<|im_end|>\n"
    assert (
        tokenizer.decode(pairs.answers[0]) == f"Count to six.{tokenizer.eos_token}"
    )  # no space after a line


def test_a_decoder_gets_the_answer_apart(tokenizer):
    pairs = encode(ROWS, tokenizer, max_answer=8, start_id=7)
    batch = pairs.batch(np.array([0]), 12)
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == ROWS[0]["text"]
    answer = [*tokenizer("Count to six.")["input_ids"], tokenizer.eos_token_id]
    mask = np.arange(8) < len(answer)
    padded = np.array([answer + [pairs.pad_id] * (8 - len(answer))], np.int32)
    for name, field in teacher_forcing(padded, mask[None].astype(np.int32), start_id=7).items():
        np.testing.assert_array_equal(batch[name], field)
    assert batch["labels"][0].tolist() == answer + [-100] * (8 - len(answer))
    np.testing.assert_array_equal(pairs.lengths, pairs.prompt_lengths)


def test_refused(tokenizer):
    with pytest.raises(DataError, match="needs {text} once"):
        encode(ROWS, tokenizer, prompt="Summary:")
    with pytest.raises(DataError, match="text 1 is blank"):
        encode([ROWS[0], {"text": " "}], tokenizer)
