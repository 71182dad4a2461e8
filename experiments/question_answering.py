"""Question answering: where in a text the answer stands, learned from few questions by a pretrained encoder.

``transfer`` fine-tunes MiniLM with two new vectors, one that finds the first token of an answer and one that finds the
last (Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 4.2); ``scratch`` trains the same architecture from
random weights on the same questions, for as many updates. Long contexts are read in overlapping windows. The best of
three validations is kept, and tested once.

    python -m experiments.question_answering --out runs/question_answering

Expected (``experiments/results/question_answering.json``, three seeds, 27 minutes of two cores): ``f1`` 0.503 ± 0.136
(``transfer``), 0.164 ± 0.023 (``scratch``), ``exact_match`` 0.378 ± 0.147 and 0.038 ± 0.008. When an error is raised
neither can say, what a default is ``transfer`` can in one seed of three; questions in new words cost it a third.

The trained model lies in ``OUT/model``, as a BertForQuestionAnswering that ``transformers`` opens; it answers the
questions of a JSON file, ``[{"question": "...", "context": "..."}]`` or as SQuAD's:

    python -m experiments.question_answering --out runs/question_answering --predict questions.json

The default data are questions over docstrings: what type `axis` has, what it defaults to, what it means, which argument
a description is of, what comes back, when an error is raised. They are real texts and real answers, but the questions
are templates, so that part of the task is to match words: the name of an argument stands in the question and in the
context. Learned is what of the entry answers which kind of question. Packages are in one split alone (SciPy and
Matplotlib, NumPy, scikit-learn), and test also asks in words that train never used. Exact match counts as SQuAD does,
without punctuation: -1 is 1. Public data: ``--data tfds:squad``; your own: ``--data questions.json`` in SQuAD's layout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import predictions, study
from experiments.common.classification import body
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from experiments.data.docstring_questions import docstring_questions
from jtl import data, pretrained
from jtl._files import write_file
from jtl.data.batches.loader import Batches, loader
from jtl.data.encode.text import best_buckets
from jtl.data.encode.windows import Windows, encode
from jtl.data.readers.questions import read_asked
from jtl.errors import InputError
from jtl.model import Model
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    escape,
    format_estimate,
    summarise,
    table,
    write_report,
    write_result,
)
from jtl.report.result import to_json
from jtl.tasks import Spans, answer_f1, exact_match, find_spans, span_head
from jtl.train import adamw, fit, make_step, schedule

RATES = {
    "transfer": 5e-4,
    "scratch": 5e-4,
}  # peaks of AdamW: 3e-4 learned more slowly, scratch was not searched
SHAPES = 3  # padded lengths
ANSWERS = "answers.json"  # of transfer on test, in --out
SHOWN = 6  # answers in their contexts, right ones and wrong ones
AROUND = 160  # characters of context on either side


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Config):
    """Settings of the application."""

    model: str = "minilm"
    """The encoder that is adapted: BERT, RoBERTa or DistilBERT."""
    data: str = "docstrings"
    """Questions: docstrings, a JSON file of SQuAD's layout or a folder of such files, or tfds:squad."""
    train_examples: int = 2000
    """Training questions; 0 for all there are."""
    test_examples: int = 1000
    """Test questions; 0 for all there are."""
    updates: int = 180
    """Updates of transfer and of scratch."""
    batch_size: int = 16
    """Windows of an update."""
    max_length: int = 128
    """Longest window in tokens, the question included."""
    stride: int = 32
    """Tokens that neighbouring windows of a long context share."""
    longest_answer: int = 30
    """Longest answer in tokens."""
    seeds: int = 3
    """Repetitions: other training questions, heads and orders."""
    predict: Path | None = None
    """Questions to answer by the model that an earlier run left in --out."""


@dataclass(frozen=True)
class Asked:
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
    for name in ("updates", "batch_size", "max_length", "longest_answer"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "question_answering")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    asked = read(sizes)
    print(asked.dataset)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("transfer", "scratch"):
            row = ledger.get(partial(trained, sizes, asked, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  exact match {row['exact_match']:.3f}  F1 {row['f1']:.3f}  "
                  f"{row['seconds']:.0f} s")  # fmt: skip

    summary = summarise(ledger.rows, ["exact_match", "f1", "seconds"])
    result = Result(
        "question_answering", settings(config), environment(), ledger.seconds, ledger.rows, summary
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title="Question answering",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("question_answering", config),
        sections=_sections(out, ledger),
        notes=[f"Data: {asked.dataset.origin}.", *asked.dataset.notes],
    )
    return result


def shortened(config: QuestionAnswering) -> QuestionAnswering:
    """The settings of ``--quick``."""
    few = {"train_examples": 400, "test_examples": 50, "updates": 20, "batch_size": 8}
    return replace(
        config, seeds=1, **{name: min(most, getattr(config, name) or most) for name, most in few.items()}
    )


def read(config: QuestionAnswering) -> Asked:
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
    return Asked(model, tokenizer, dataset, splits, buckets)


def encoded(config: QuestionAnswering, model: Model, tokenizer: Any, examples: list[Any]) -> Windows:
    """Questions as windows of tokens that ``model`` reads."""
    return encode(
        examples, tokenizer, config.max_length, config.stride,
        segments=getattr(model.config, "type_vocab_size", 1) > 1, vocab_size=model.config.vocab_size,
    )  # fmt: skip


# --- arms ------------------------------------------------------------------------------------------


def trained(
    config: QuestionAnswering, asked: Asked, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a network that learns from the training questions; keeps the first ``transfer``."""
    began = time.monotonic()
    source = asked.dataset.splits["train"]
    count = config.train_examples or len(source)
    chosen = np.random.default_rng(seed).permutation(len(source))[:count]
    train = encoded(config, asked.pretrained, asked.tokenizer, [source[int(i)] for i in chosen])
    steps, size = config.updates, min(config.batch_size, len(train))

    body_key, head_key, run_key = jax.random.split(jax.random.key(seed), 3)
    start = asked.pretrained if arm == "transfer" else pretrained.scratch(config.model, key=body_key)
    model = span_head(start, key=head_key)
    step = make_step(Spans(), adamw(schedule(RATES[arm], steps), weight_decay=0.01))
    epochs = -(-steps // (len(train) // size))
    fitted = fit(
        step,
        step.init(model, run_key),
        loader(Batches(train, size, seed=seed, epochs=epochs, buckets=asked.buckets)),
        steps=steps,
        validate=lambda model: scores(*answered(config, asked, model, "validation")),
        validate_every=-(-steps // (1 if config.quick else 3)),
        metric="f1",
    )
    examples, said = answered(config, asked, fitted.model, "test")
    row = {**scores(examples, said), **by_kind(examples, said)}
    row |= {"seconds": time.monotonic() - began, "steps": steps, "windows": len(train)}
    if arm == "transfer" and seed == config.seed:
        keep(config, fitted.model, examples, said)
    return row, fitted.history


def answered(
    config: QuestionAnswering, asked: Asked, model: Model, split: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The questions of a split and the model's answers."""
    windows, examples = asked.splits[split]
    return examples, answers(config, model, windows, examples, asked.buckets)


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
    """Store the model as a Hugging Face folder, and what it says on test."""
    out = Path(config.out)
    pretrained.save(model, out / predictions.MODEL, tokenizer=config.model, overwrite=True)
    rows = [{**example, "said": own} for example, own in zip(examples, said, strict=True)]
    write_file(out / ANSWERS, to_json(rows))


# --- use again -------------------------------------------------------------------------------------


def answer(config: QuestionAnswering, path: Path) -> None:
    """Answer the questions of a file by the model in ``config.out``; writes predictions.json there."""
    out = Path(config.out)
    folder = out / predictions.MODEL
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {folder} is none: run without --predict first"
        )
    examples = read_asked(path)
    # BertForQuestionAnswering has no pooler: a new one is made, which nothing reads.
    model, tokenizer = pretrained.load(folder, key=jax.random.key(0)), pretrained.tokenizer(folder)
    windows = encoded(config, model, tokenizer, examples)
    said = answers(config, model, windows, examples, windows.buckets)
    rows = [{"question": one["question"], **own} for one, own in zip(examples, said, strict=True)]
    write_file(out / "predictions.json", to_json(rows))
    for row in rows[:20]:
        print(f"{row['probability']:.2f}  {row['question']}  {row['answer']}")
    print(f"{len(rows)} questions answered: {out / 'predictions.json'}")


# --- report ----------------------------------------------------------------------------------------


def _sections(out: Path, ledger: ResumableRows) -> list[Section]:
    rows = json.loads((out / ANSWERS).read_text(encoding="utf-8"))
    right = [bool(exact_match([row["said"]["answer"]], [row["answers"]])) for row in rows]
    order = np.argsort([-row["said"]["probability"] for row in rows], kind="stable")
    wrong = [int(i) for i in order if not right[i]]
    hits = [i for i in range(len(rows)) if right[i]]
    every = max(1, len(hits) // SHOWN)
    sections = [
        study.transferred_or_scratch(ledger.rows, ("exact_match", "f1")),
        Section(
            "Learning curves",
            "Training loss and F1 on validation.",
            figures.learning_curves(ledger.curves, "validation_f1"),
        ),
    ]
    if kinds := [name for name in ledger.rows[0] if name.startswith("f1_")]:
        found = summarise(ledger.rows, kinds)
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
            "Right ones of `transfer`, the first seed, in **bold**.\n\n"
            + "\n\n".join(highlighted(rows[i]) for i in hits[::every][:SHOWN]),
        ),
        Section(
            "Surest errors",
            "What was said in **bold**, what was right after each text.\n\n"
            + ("\n\n".join(highlighted(rows[i]) for i in wrong[:SHOWN]) or "There are none."),
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


def predict(config: QuestionAnswering) -> None:
    """Answer with what was trained."""
    assert config.predict is not None
    answer(config, config.predict)


if __name__ == "__main__":
    main(run, QuestionAnswering, predict)
