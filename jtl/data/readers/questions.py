"""Questions whose answers stand in a context, as in SQuAD: your own JSON files, or a public set of TensorFlow Datasets.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", https://arxiv.org/abs/1606.05250.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from jtl.data.dataset import DataError, Dataset, Example, Source, by_split, complete
from jtl.data.readers.tfds import (
    TfdsSource,
    as_dataset,
    find_builder,
    open_sources,
    plain_value,
    standard_splits,
)


def own(path: Path) -> Dataset:
    """Loads your own questions, in SQuAD's format.

    ``path`` is a ``.json`` file of SQuAD's layout, or a folder with such files ``train.json`` and optionally
    ``validation.json`` (or ``dev.json``) and ``test.json``. Questions without an answer, as in SQuAD 2.0, are left out.

    An example has ``question``, ``context``, ``answers`` (one or more texts that count as right) and ``starts``, where
    each begins in the context, in characters.

    Missing splits are cut from train by hash of the context, so that no two splits share a context.

    Args:
        path: the file or folder.

    Raises:
        DataError: another layout, an answer that is not where ``answer_start`` says, or no questions.
    """
    files = {"train": path} if path.is_file() else by_split(path, sorted(path.glob("*.json")))
    if not files:
        raise DataError(f"{path}: holds no train.json of SQuAD's layout")
    read = {split: read_squad(file) for split, file in files.items()}
    splits = {split: examples for split, (examples, _) in read.items()}
    notes = tuple(
        f"{left_out} questions of {files[split].name} have no answer and were left out"
        for split, (_, left_out) in read.items()
        if left_out
    )
    return dataset(str(path), splits, f"your files at {path}", notes)


def dataset(
    name: str, splits: Mapping[str, list[Example]], origin: str, notes: Sequence[str] = ()
) -> Dataset:
    """Returns a data set of questions from its splits; missing ones are cut from train by hash of the context."""
    keys = [one["context"] for one in splits["train"]]
    whole: dict[str, Source] = {split: source for split, source in splits.items()}
    cut, carved = complete(whole, keys)
    digest = hashlib.sha256()
    for split, source in cut.items():
        for i in range(len(source)):
            digest.update(f"{split}\n{source[i]['question']}\n{source[i]['context']}\n".encode())
    return Dataset(name, "question", cut, (), origin, digest.hexdigest()[:16], (*notes, *carved))


# --- files -----------------------------------------------------------------------------------------


def read_squad(path: Path) -> tuple[list[Example], int]:
    """Reads the questions of a SQuAD JSON file; returns them and the number of unanswerable ones, which are left out.

    Raises:
        DataError: another layout, or an answer that is not where its ``answer_start`` says.
    """
    examples: list[Example] = []
    left_out = 0
    for context, asked in _paragraphs(path):
        for place, one in enumerate(asked):
            where = f"{path}: question {one.get('id', place)!r}"
            if not isinstance(one.get("question"), str) or not isinstance(one.get("answers"), list):
                raise DataError(f"{where} needs a text `question` and a list `answers`, found {sorted(one)}")
            try:
                answers = [(own["text"], int(own["answer_start"])) for own in one["answers"]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{where}: each answer needs a `text` and an `answer_start`") from error
            for text, start in answers:
                if not text or context[start : start + len(text)] != text:
                    raise DataError(
                        f"{where}: the answer {text!r} does not stand at character {start}, where there is "
                        f"{context[start : start + len(text)]!r}"
                    )
            if not answers:
                left_out += 1
                continue
            texts, starts = zip(*answers, strict=True)
            examples.append(
                {
                    "question": one["question"],
                    "context": context,
                    "answers": list(texts),
                    "starts": list(starts),
                }
            )
    if not examples:
        raise DataError(f"{path}: holds no question with an answer")
    return examples, left_out


def _paragraphs(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each context of a SQuAD JSON file with the questions about it; DataError for another layout."""
    found = _json(path)
    try:
        for document in found["data"]:
            for paragraph in document["paragraphs"]:
                context, asked = paragraph["context"], paragraph["qas"]
                if not isinstance(context, str) or not all(isinstance(one, dict) for one in asked):
                    raise TypeError(f"context is {type(context).__name__}")
                yield context, asked
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not of SQuAD's layout ({type(error).__name__} {error}): expected "
            '{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": [{"text": "...", '
            '"answer_start": 0}]}]}]}]}'
        ) from error


def read_asked(path: Path) -> list[Example]:
    """Reads questions without answers from a JSON file.

    It holds a list of objects with ``question`` and ``context``, or has SQuAD's layout.

    Raises:
        DataError: another layout, or no questions.
    """
    found = _json(path)
    if not isinstance(found, list):
        return [
            {"question": one["question"], "context": context}
            for context, asked in _paragraphs(path)
            for one in asked
            if isinstance(one.get("question"), str)
        ]
    for place, one in enumerate(found):
        wanted = ("question", "context")
        if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in wanted):
            raise DataError(
                f"{path}: item {place} is {json.dumps(one)[:80]}: expected an object with the texts `question` and "
                "`context`"
            )
    if not found:
        raise DataError(f"{path}: holds no questions")
    return [{"question": one["question"], "context": one["context"]} for one in found]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: is not JSON in UTF-8 ({error})") from error


def public(name: str) -> Dataset:
    """Loads a public set of questions.

    The set must have SQuAD's columns ``question``, ``context`` and ``answers``. Questions without an answer are kept.

    An example has ``question``, ``context``, ``answers`` (texts that count as right) and ``starts``, where each begins
    in the context, in characters.

    Missing splits are cut from train by hash of the position, so splits may share a context.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns.
        ConnectionError: the set has to be downloaded and there is no network.
    """
    builder = find_builder(name)
    features = builder.info.features
    if missing := [column for column in ("question", "context", "answers") if column not in features]:
        raise DataError(
            f"{name}: no column {missing[0]!r}; it has {', '.join(features)}. Questions need SQuAD's columns"
        )
    sources = {split: Asked(source) for split, source in open_sources(name, builder, ()).items()}
    splits, notes = standard_splits(name, sources)
    return as_dataset(name, builder, "question", splits, notes)


@dataclass(frozen=True, eq=False)
class Asked:
    """Rows with SQuAD's columns, as examples of ``public``."""

    source: TfdsSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        row = self.source[index]
        answers = row["answers"]
        return {
            "question": row["question"],
            "context": row["context"],
            "answers": [plain_value(text) for text in answers["text"]],
            "starts": [plain_value(start) for start in answers["answer_start"]],
        }
