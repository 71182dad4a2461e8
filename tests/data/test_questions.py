"""Questions from files and from TensorFlow Datasets, and their windows of tokens."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jtl import pretrained
from jtl.data import DataError, load
from jtl.data.encode.windows import encode
from jtl.data.readers.questions import read_asked

CONTEXT = "MiniLM was made in 2020 by Microsoft. " * 3 + "It reads English."


def squad(path, count=30, **changes):
    asked = {
        "id": "q0",
        "question": "Who made MiniLM?",
        "answers": [{"text": "Microsoft", "answer_start": CONTEXT.index("Microsoft")}],
    }
    paragraphs = [{"context": f"{CONTEXT} {i}", "qas": [asked]} for i in range(count)]
    paragraphs[0]["qas"] = [{**asked, **changes}]
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}))
    return path


def test_a_file_of_squads_layout(tmp_path):
    dataset = load(squad(tmp_path / "my.json", answers=[], is_impossible=True), "questions")
    sizes = {split: len(source) for split, source in dataset.splits.items()}
    assert sizes == {"train": 21, "validation": 2, "test": 6} and dataset.kind == "question"
    assert "1 questions of my.json have no answer" in dataset.notes[0]
    contexts = [{source[i]["context"] for i in range(len(source))} for source in dataset.splits.values()]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2]
    one = dataset.splits["train"][0]
    assert one["answers"] == ["Microsoft"] and one["context"][one["starts"][0] :].startswith("Microsoft")
    assert "question; train 21" in str(dataset)


def test_a_folder_of_files(tmp_path):
    squad(tmp_path / "train.json"), squad(tmp_path / "dev.json", 5)
    dataset = load(tmp_path, "questions")
    assert {split: len(source) for split, source in dataset.splits.items()} == {
        "train": 24, "validation": 5, "test": 6,
    }  # fmt: skip


def test_wrong_files_are_refused(tmp_path):
    moved = [{"text": "Microsoft", "answer_start": 3}]
    with pytest.raises(
        DataError, match="question 'q0': the answer 'Microsoft' does not stand at character 3"
    ):
        load(squad(tmp_path / "moved.json", answers=moved), "questions")
    with pytest.raises(DataError, match="'q0': each answer needs a `text`"):
        load(squad(tmp_path / "bare.json", answers=["Microsoft"]), "questions")
    (tmp_path / "other.json").write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(DataError, match="not of SQuAD's layout \\(KeyError 'paragraphs'\\)"):
        load(tmp_path / "other.json", "questions")
    (tmp_path / "text.json").write_text("Who?")
    with pytest.raises(DataError, match="is not JSON"):
        load(tmp_path / "text.json", "questions")
    with pytest.raises(FileNotFoundError, match="no data file or folder at"):
        load(tmp_path / "none.json", "questions")
    with pytest.raises(DataError, match="unknown data set 'squad' of questions"):
        load("squad", "questions")


def test_questions_to_answer(tmp_path):
    path = tmp_path / "ask.json"
    path.write_text(json.dumps([{"question": "Who?", "context": "He."}]))
    assert read_asked(path) == [{"question": "Who?", "context": "He."}]
    assert len(read_asked(squad(tmp_path / "squad.json", 4, answers=[]))) == 4
    for wrong in ([{"question": "Who?"}], ["Who?"]):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="item 0 is .* expected an object"):
            read_asked(path)


class Quiz(tfds.core.GeneratorBasedBuilder):
    """Of SQuAD's columns."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True
    name = "jtl_quiz"

    def _info(self):
        answers = {"text": tfds.features.Text(), "answer_start": np.int32}
        features = {
            "question": tfds.features.Text(),
            "context": tfds.features.Text(),
            "answers": tfds.features.Sequence(answers),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "validation": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = {"text": ["né", "é"], "answer_start": [3, 4]}
            yield i, {"question": f"Who {i}?", "context": "Je né suis", "answers": answers}


def test_public_questions(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    Quiz(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = load("tfds:jtl_quiz", "questions")
    assert {split: len(source) for split, source in dataset.splits.items()} == {
        "train": 36, "validation": 4, "test": 5,
    }  # fmt: skip
    one = dataset.splits["test"][0]
    assert one["answers"] == ["né", "é"] and one["starts"] == [3, 4] and one["context"] == "Je né suis"
    assert "validation is test" in dataset.notes[0]


# --- windows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.tokenizer("minilm")


def asked(context, answer, start=None):
    start = context.index(answer) if start is None else start
    return {"question": "what is it?", "context": context, "answers": [answer], "starts": [start]}


def test_a_short_context_is_one_window(tokenizer):
    windows = encode([asked("It is a Tokenizer, fast.", "Tokenizer")], tokenizer)
    batch = windows.batch(np.array([0]), 24)
    start, end = batch["start"][0], batch["end"][0]
    assert tokenizer.decode(batch["input_ids"][0, start : end + 1]) == "tokenizer"
    assert tokenizer.decode(batch["input_ids"][0, batch["inside"][0] == 1]) == "it is a tokenizer, fast."
    np.testing.assert_array_equal(windows.in_context(np.array([0]), batch["start"], batch["end"]), [[8, 17]])
    types, mask = batch["token_type_ids"][0], batch["attention_mask"][0]
    assert mask.sum() == len(windows.tokens) and (types * (1 - mask)).sum() == 0
    assert types.sum() == batch["inside"].sum() + 1  # the last [SEP] is of the second part
    assert "token_type_ids" not in encode([asked("a b", "a")], tokenizer, segments=False).batch(
        np.array([0]), 16
    )


def test_windows_cover_a_long_context_and_overlap(tokenizer):
    context = " ".join(f"word{i}" for i in range(60)) + " needle " + " ".join(["end"] * 20)
    windows = encode([asked("short one", "one"), asked(context, "needle")], tokenizer, 40, 12)
    own = np.flatnonzero(windows.example == 1)
    assert len(own) > 4 and windows.lengths.max() <= 40
    spans = windows.in_context(own, windows.context[own, 0], windows.context[own, 1])
    assert spans[0, 0] == 0 and spans[-1, 1] == len(context)
    for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
        shared = tokenizer(context[begin:end], add_special_tokens=False)["input_ids"]
        assert len(shared) == 12
    place = context.index("needle")
    for window, (begin, end) in zip(own, spans, strict=True):
        start, stop = windows.answer[window]
        if begin <= place and place + 6 <= end:
            assert windows.in_context(np.array([window]), np.array([start]), np.array([stop])).tolist() == [
                [place, place + 6]
            ]
        else:
            assert (start, stop) == (0, 0)
    assert (windows.answer[own] > 0).any()


def test_questions_that_leave_no_room_are_refused(tokenizer):
    long = {"question": "why " * 30, "context": "Because."}
    with pytest.raises(DataError, match="question 1 has 30 tokens, which leave 7 of a window of 40"):
        encode([asked("a b", "a"), long], tokenizer, 40, 12)
    with pytest.raises(DataError, match="embeddings of 0 to 99"):
        encode([asked("a b", "a")], tokenizer, vocab_size=100)
    with pytest.raises(DataError, match="context of question 0 has no tokens"):
        encode([{"question": "why?", "context": " "}], tokenizer)
