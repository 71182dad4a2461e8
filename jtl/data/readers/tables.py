"""Tables: CSV, TSV and JSONL files, read by column."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jtl.data.dataset import SPLITS, DataError, Dataset, Example, Source, check_labels, complete, digest

TABLES = (".csv", ".tsv", ".jsonl")


def labelled(path: Path, files: Mapping[str, Path], text_column: str, label_column: str) -> Dataset:
    """Loads labelled texts from one table per split; see ``jtl.data.readers.labels``."""
    rows = {split: list(_read(file, text_column, label_column)) for split, file in files.items()}
    for split, file in files.items():
        if not rows[split]:
            raise DataError(f"{file}: split {split} is empty; give it rows or leave the file out")
    classes, number = _classes(rows, files, label_column)
    examples = {
        split: [{"text": text, "label": number[label]} for _, text, label in part]
        for split, part in rows.items()
    }
    for split, part in rows.items():
        check_labels([number[label] for _, _, label in part], classes, split, str(files[split]))
    notes = []
    if blank := sum(not text.strip() for part in rows.values() for _, text, _ in part):
        notes.append(f"{blank} texts are blank")
    train = rows["train"]
    splits, carved = complete(
        examples, [text for _, text, _ in train], [number[label] for _, _, label in train]
    )
    return Dataset(
        name=str(path), kind="text", splits=splits, classes=classes, origin=f"your files at {path}",
        version=digest(files.values()), notes=(*notes, *carved, *_repeats(splits)),
    )  # fmt: skip


def _read(file: Path, text_column: str, label_column: str) -> Iterator[tuple[int, str, Any]]:
    """(line number, text, label) of each row."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            for line, row in (_read_jsonl if file.suffix == ".jsonl" else _read_csv)(file, stream):
                for column in (text_column, label_column):
                    if column not in row:
                        raise DataError(
                            f"{file}, line {line}: no column {column!r}; it has {', '.join(map(repr, row))}. "
                            "Choose with --text-column and --label-column"
                        )
                text, label = row[text_column], row[label_column]
                if not isinstance(text, str):
                    raise DataError(f"{file}, line {line}: {text_column!r} should be a text, found {text!r}")
                if label is None or label == "":
                    raise DataError(f"{file}, line {line}: {label_column!r} is missing")
                yield line, text, label
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error}); save it as UTF-8") from error


def read_texts(path: Path, column: str = "text") -> list[str]:
    """Reads texts without labels: the non-blank lines of a ``.txt`` file, or a column of a CSV, TSV or JSONL file.

    Raises:
        DataError: there are no texts, no such column, or the file is of another type.
    """
    if path.suffix not in (*TABLES, ".txt"):
        raise DataError(f"{path}: expected a file ending in {', '.join((*TABLES, '.txt'))}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".txt":
                texts = [line.strip() for line in stream]
            else:
                rows = list((_read_jsonl if path.suffix == ".jsonl" else _read_csv)(path, stream))
                if rows and column not in rows[0][1]:
                    raise DataError(
                        f"{path}: no column {column!r}; it has {', '.join(map(repr, rows[0][1]))}"
                    )
                texts = [str(row[column]).strip() for _, row in rows]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    if not (found := [text for text in texts if text]):
        raise DataError(f"{path}: holds no texts")
    return found


def read_columns(path: Path, columns: Mapping[str, str]) -> list[Example]:
    """Reads text columns of a CSV, TSV or JSONL file, one example per row.

    Args:
        path: the file.
        columns: the file's column for each field of an example.

    Raises:
        DataError: a column is missing, a cell is blank or not a text, or the file has no rows or is of another type.
    """
    if path.suffix not in TABLES:
        raise DataError(f"{path}: expected a file ending in {', '.join(TABLES)}")
    examples: list[Example] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            for line, row in (_read_jsonl if path.suffix == ".jsonl" else _read_csv)(path, stream):
                for theirs in columns.values():
                    if theirs not in row:
                        raise DataError(
                            f"{path}, line {line}: no column {theirs!r}; it has {', '.join(map(repr, row))}"
                        )
                    if not isinstance(row[theirs], str) or not row[theirs].strip():
                        raise DataError(
                            f"{path}, line {line}: {theirs!r} should be a text, found {row[theirs]!r}"
                        )
                examples.append({ours: row[theirs].strip() for ours, theirs in columns.items()})
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    if not examples:
        raise DataError(f"{path}: holds no rows")
    return examples


def _read_csv(file: Path, stream) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key) + len(row.get(None, ()))
                raise DataError(
                    f"{file}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells, found {found}; "
                    "a cell that holds the delimiter needs quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{file}, after line {reader.line_num}: {error}; is a quote left open?") from error


def _read_jsonl(file: Path, stream) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {line}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {line}: expected a JSON object, found {text[:40].strip()!r}")
        yield line, row


def _classes(rows, files, label_column: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names and the number of every raw label: whole numbers if all of train are, else sorted names, numbered."""
    for split, part in rows.items():
        for line, _, label in part:
            if isinstance(label, bool) or not isinstance(label, (str, int, float)):
                raise DataError(
                    f"{files[split]}, line {line}: {label_column!r} should be a name or a whole number, found {label!r}"
                )
    whole = {label: number for part in rows.values() for _, _, label in part
             if (number := _whole(label)) is not None}  # fmt: skip
    train = {label for _, _, label in rows["train"]}
    numeric = [label for label in train if _number(label)]
    if numeric:
        for split, part in rows.items():
            for line, _, label in part:
                if label not in whole:
                    raise DataError(
                        f"{files[split]}, line {line}: {label_column!r} is {label!r}, no whole number, but other "
                        "labels of train are numbers; labels are 0, 1, 2, ... or all names"
                    )
        count = max(whole[label] for label in train) + 1
        if count > max(1000, 2 * len(rows["train"])):
            raise DataError(f"{files['train']}: {label_column!r} holds {count - 1}: is that a class number?")
        return tuple(str(i) for i in range(count)), whole
    names = tuple(sorted(train))
    if len(names) > 20 and len(names) > len(rows["train"]) / 2:
        raise DataError(
            f"{files['train']}: {label_column!r} has {len(names)} different values in {len(rows['train'])} rows: "
            "is that the label? Choose with --label-column"
        )
    for split, part in rows.items():
        for line, _, label in part:
            if label not in train:
                shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
                raise DataError(
                    f"{files[split]}, line {line}: label {label!r} of split {split} is unseen in train, "
                    f"which has {shown}"
                )
    return names, {name: i for i, name in enumerate(names)}


def _number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _whole(label: Any) -> int | None:
    return int(float(label)) if _number(label) and float(label).is_integer() else None


def _repeats(splits: Mapping[str, Source]) -> list[str]:
    seen = {one["text"] for one in map(splits["train"].__getitem__, range(len(splits["train"])))}
    notes = []
    for split in SPLITS[1:]:
        source = splits[split]
        if count := sum(source[i]["text"] in seen for i in range(len(source))):
            notes.append(f"{count} of {len(source)} texts of {split} are also in train")
    return notes
