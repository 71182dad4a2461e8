"""Question answering: find the answer to a question in a text, learned from few questions.

``transfer`` fine-tunes MiniLM with a new head that points to the first and the last token of the answer (Devlin et al.
2019, https://arxiv.org/abs/1810.04805, section 4.2); ``scratch`` trains the same architecture from random weights on
the same questions, with as many updates. Long contexts are read in overlapping windows.

    python -m experiments.question_answering --out runs/question_answering
    python -m experiments.question_answering --out runs/question_answering --predict questions.json

The second command answers the questions of a JSON file, ``[{"question": "...", "context": "..."}]`` or in SQuAD's
layout, with the model that the first left in ``OUT/model``, a BertForQuestionAnswering that ``transformers`` opens. The
default data are questions over docstrings of installed packages. Public data: ``--data tfds:squad``; your own: ``--data
questions.json`` in SQuAD's layout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import predictions, recipe, study
from experiments.common.classification import body
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, at_least, at_most, prepare
from experiments.data.docstring_questions import docstring_questions
from jtl import data, pretrained
from jtl._files import write_file
from jtl.data.batches.loader import Batches
from jtl.data.encode.text import best_buckets
from jtl.data.encode.windows import Windows, encode
from jtl.data.readers.questions import read_asked
from jtl.model import Model
from jtl.report import Result, Section, escape, figures, format_estimate, summarise, table, to_json
from jtl.tasks import Spans, answer_f1, exact_match, find_spans, span_head

ABOUT = """\
``transfer`` fine-tunes MiniLM with a new head that points to the first and the last token of the answer (Devlin et al.
2019, https://arxiv.org/abs/1810.04805, section 4.2); ``scratch`` trains the same architecture from random weights on
the same questions, for as many updates. Long contexts are read in overlapping windows. Validation picks the checkpoint,
which is tested once. Exact match ignores punctuation and articles, as SQuAD's does: -1 equals 1. The default data are
questions over docstrings: the type of an argument, its default, its meaning, which argument a description belongs to,
what a function returns, when an error is raised. The texts and answers are real, but the questions are templates: part
of the task is to find the name of the argument from the question in the context. Each package is in one split alone
(train: SciPy and Matplotlib, validation: NumPy, test: scikit-learn), and test has wordings that train lacks."""
RATES = {
    "transfer": 5e-4,
    "scratch": 5e-4,
}  # peaks of AdamW: 3e-4 was slower for transfer; not searched for scratch
SHAPES = 3  # padded lengths
ANSWERS = "answers.json"  # of transfer on test, in --out
SHOWN = 6  # answers in their contexts, of right and of wrong ones
AROUND = 160  # characters of context on either side


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Config):
    """Settings of the application."""

    model: str = "minilm"
    """The encoder that is adapted: BERT, RoBERTa or DistilBERT."""
    data: str = "docstrings"
    """Questions: docstrings, a JSON file of SQuAD's layout or a folder of such files, or tfds:squad."""
    train_examples: int = at_least(0, 2000)
    """Training questions; 0 for all there are."""
    test_examples: int = at_least(0, 1000)
    """Test questions; 0 for all there are."""
    updates: int = at_least(1, 180)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 16)
    """Windows of an update."""
    max_length: int = at_least(1, 128)
    """Longest window in tokens, the question included."""
    stride: int = at_least(0, 32)
    """Tokens that neighbouring windows of a long context share."""
    longest_answer: int = at_least(1, 30)
    """Longest answer in tokens."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training questions, heads and orders."""
    predict: Path | None = None
    """Questions to answer with the model that an earlier run left in --out."""


@dataclass(frozen=True)
class Questions:
    """Questions made ready for a model.

    Attributes:
        pretrained: the encoder without a head.
        tokenizer: its own.
        dataset: the questions as they were loaded.
        splits: validation and test, encoded, with their examples.
        buckets: padded lengths of all batches.
    """

    pretrained: Model
    tokenizer: Any
    dataset: data.Dataset
    splits: dict[str, tuple[Windows, list[Any]]]
    buckets: tuple[int, ...]


def run(config: QuestionAnswering) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "question_answering")
    rows = ResumableRows(out, resume=config.resume)
    few = {"train_examples": 400, "test_examples": 50, "updates": 20, "batch_size": 8, "seeds": 1}
    sizes = at_most(config, **few) if config.quick else config
    questions = read(sizes)
    print(questions.dataset)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("transfer", "scratch"):
            row = rows.get(partial(trained, sizes, questions, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  exact match {row['exact_match']:.3f}  F1 {row['f1']:.3f}  "
                  f"{row['seconds']:.0f} s")  # fmt: skip

    return study.finish(
        "question_answering", config, rows, _sections(out, rows), title="Question answering", about=ABOUT,
        metrics=("exact_match", "f1"), notes=[f"Data: {questions.dataset.origin}.", *questions.dataset.notes],
    )  # fmt: skip


def read(config: QuestionAnswering) -> Questions:
    """Load the model and the questions, and cut these into windows."""
    dataset = docstring_questions() if config.data == "docstrings" else data.load(config.data, "questions")
    model, tokenizer = body(config.model), pretrained.tokenizer(config.model)
    limits = {"validation": 20 if config.quick else 200, "test": config.test_examples}
    splits = {}
    for split, limit in limits.items():
        source = dataset.splits[split]
        chosen = np.random.default_rng(0).permutation(len(source))[: limit or None]
        examples = [source[int(i)] for i in chosen]
        splits[split] = (encoded(config, model, tokenizer, examples), examples)
    lengths = np.concatenate([[config.max_length], *(windows.lengths for windows, _ in splits.values())])
    buckets = best_buckets(lengths, 1 if config.quick else SHAPES, config.max_length)
    return Questions(model, tokenizer, dataset, splits, buckets)


def encoded(config: QuestionAnswering, model: Model, tokenizer: Any, examples: list[Any]) -> Windows:
    """Questions as windows of tokens that ``model`` reads."""
    return encode(
        examples, tokenizer, config.max_length, config.stride,
        segments=getattr(model.config, "type_vocab_size", 1) > 1, vocab_size=model.config.vocab_size,
    )  # fmt: skip


# --- arms ------------------------------------------------------------------------------------------


def trained(
    config: QuestionAnswering, questions: Questions, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of an arm; stores the first ``transfer``."""
    began = time.monotonic()
    source = questions.dataset.splits["train"]
    count = config.train_examples or len(source)
    chosen = np.random.default_rng(seed).permutation(len(source))[:count]
    train = encoded(config, questions.pretrained, questions.tokenizer, [source[int(i)] for i in chosen])
    steps, size = config.updates, min(config.batch_size, len(train))
    body_key, head_key, run_key = jax.random.split(jax.random.key(seed), 3)
    start = questions.pretrained if arm == "transfer" else pretrained.scratch(config.model, key=body_key)
    fitted = recipe.train(
        recipe.Recipe(
            span_head(start, key=head_key),
            Spans(),
            Batches(train, size, seed=seed, steps=steps, buckets=questions.buckets),
        ),
        steps=steps,
        rate=RATES[arm],
        seed=run_key,
        validate=lambda model: scores(*answered(config, questions, model, "validation")),
        validate_every=-(-steps // (1 if config.quick else 3)),
        metric="f1",
    )
    examples, said = answered(config, questions, fitted.model, "test")
    row = {**scores(examples, said), **by_kind(examples, said)}
    row |= {"seconds": time.monotonic() - began, "steps": steps, "windows": len(train)}
    if arm == "transfer" and seed == config.seed:
        keep(config, fitted.model, examples, said)
    return row, fitted.history


def answered(
    config: QuestionAnswering, questions: Questions, model: Model, split: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The questions of a split and the model's answers."""
    windows, examples = questions.splits[split]
    return examples, answers(config, model, windows, examples, questions.buckets)


def answers(
    config: QuestionAnswering, model: Model, windows: Windows, examples: list[Any], buckets: Sequence[int]
) -> list[dict[str, Any]]:
    """``answer``, its place ``start``, and its ``probability``: the likeliest span of all windows of a question."""
    batches = Batches(windows, 32, train=False, buckets=tuple(buckets))
    found = find_spans(model, batches, longest=config.longest_answer)
    places = windows.in_context(np.arange(len(windows)), np.asarray(found.start), np.asarray(found.end))
    best: dict[int, int] = {}
    for window in np.argsort(found.log_probability, kind="stable"):
        best[int(windows.example[window])] = int(window)  # the last is the likeliest
    said = []
    for i, example in enumerate(examples):
        begin, end = (int(place) for place in places[best[i]])
        probability = float(np.exp(found.log_probability[best[i]]))
        said.append({"answer": example["context"][begin:end], "start": begin, "probability": probability})
    return said


def scores(examples: Sequence[Any], said: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match and F1."""
    given, right = [own["answer"] for own in said], [one["answers"] for one in examples]
    return {"exact_match": exact_match(given, right), "f1": answer_f1(given, right)}


def by_kind(examples: Sequence[Any], said: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """F1 of each kind of question, and of wordings that were in train and that were not, where the data say so."""
    found = {}
    for field, values in (("kind", {one.get("kind") for one in examples}), ("new", {0, 1})):
        for value in sorted(values - {None}, key=str):
            rows = [i for i, one in enumerate(examples) if one.get(field) == value]
            if rows:
                name = value if field == "kind" else ("old_wordings", "new_wordings")[value]
                found[f"f1_{name}"] = scores([examples[i] for i in rows], [said[i] for i in rows])["f1"]
    return found


def keep(config: QuestionAnswering, model: Model, examples: list[Any], said: list[dict[str, Any]]) -> None:
    """Store the model as a Hugging Face folder, and its answers on test."""
    out = Path(config.out)
    pretrained.save(model, out / predictions.MODEL, tokenizer=config.model, overwrite=True)
    rows = [{**example, "said": own} for example, own in zip(examples, said, strict=True)]
    write_file(out / ANSWERS, to_json(rows))


# --- use again -------------------------------------------------------------------------------------


def predict(config: QuestionAnswering) -> None:
    """Answer the questions of a file with the model in ``config.out``; writes predictions.json there."""
    assert config.predict is not None
    out = Path(config.out)
    folder = predictions.trained(out / predictions.MODEL)
    examples = read_asked(config.predict)
    # BertForQuestionAnswering has no pooler: a new one is made, which nothing reads.
    model, tokenizer = pretrained.load(folder, key=jax.random.key(0)), pretrained.tokenizer(folder)
    windows = encoded(config, model, tokenizer, examples)
    said = answers(config, model, windows, examples, windows.buckets)
    rows = [{"question": one["question"], **own} for one, own in zip(examples, said, strict=True)]
    predictions.write_json(out, rows, "{probability:.2f}  {question}  {answer}", "questions answered")


# --- report ----------------------------------------------------------------------------------------


def _sections(out: Path, rows: ResumableRows) -> list[Section]:
    said = json.loads((out / ANSWERS).read_text(encoding="utf-8"))
    right = [bool(exact_match([one["said"]["answer"]], [one["answers"]])) for one in said]
    order = np.argsort([-one["said"]["probability"] for one in said], kind="stable")
    wrong = [int(i) for i in order if not right[i]]
    hits = [i for i in range(len(said)) if right[i]]
    every = max(1, len(hits) // SHOWN)
    sections = [
        study.transferred_or_scratch(rows.rows, ("exact_match", "f1")),
        Section(
            "Learning curves",
            "Training loss and F1 on validation.",
            figures.learning_curves(rows.curves, "validation_f1"),
        ),
    ]
    if kinds := [name for name in rows.rows[0] if name.startswith("f1_")]:
        found = summarise(rows.rows, kinds)
        lines = [
            [
                name.removeprefix("f1_").replace("_", " "),
                *(format_estimate(own) for own in found[name].values()),
            ]
            for name in kinds
        ]
        sections.append(Section("F1 by kind of question", table(["kind", *found[kinds[0]]], lines)))
    return [
        *sections,
        Section(
            "Answers in their contexts",
            "Right answers of `transfer`, the first seed, in **bold**.\n\n"
            + "\n\n".join(highlighted(said[i]) for i in hits[::every][:SHOWN]),
        ),
        Section(
            "Surest errors",
            "The model's answer in **bold**, the right one after each text.\n\n"
            + ("\n\n".join(highlighted(said[i]) for i in wrong[:SHOWN]) or "There are none."),
        ),
    ]


def highlighted(row: Mapping[str, Any]) -> str:
    """A question and the part of its context around what was said, in Markdown."""
    said, context = row["said"], row["context"]
    begin, end = said["start"], said["start"] + len(said["answer"])
    before, after = context[max(0, begin - AROUND) : begin], context[end : end + AROUND]
    before = ("…" if begin > AROUND else "") + before
    after += "…" if end + AROUND < len(context) else ""
    gaps = [" " if part.isspace() else "" for part in (before[-1:], after[:1])]
    shown = f"{escape(before)}{gaps[0]}**{escape(said['answer'])}**{gaps[1]}{escape(after)}"
    right = (
        f"\n>\n> Right: {escape(' / '.join(row['answers']))}" if said["answer"] not in row["answers"] else ""
    )
    return f"**{escape(row['question'])}** ({said['probability']:.2f})\n\n> {shown}{right}"


if __name__ == "__main__":
    main(run, QuestionAnswering, predict)
