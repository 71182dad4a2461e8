"""Sentiment: what a review says of its film, learned from few labels by a pretrained encoder.

``transfer`` fine-tunes MiniLM on ``--train-examples`` labelled texts; ``scratch`` trains the same architecture from
random weights on the same texts, for as many updates. ``prompt`` trains nothing: SmolLM2 reads the text and
"Sentiment:", and the class whose word it finds likelier than after a prompt without a text is its answer (Zhao et al.
2021, "Calibrate Before Use", https://arxiv.org/abs/2102.09690). ``majority`` always names the commonest class. Models
were chosen on validation and tested once.

    python -m experiments.sentiment --out runs/sentiment

Expected (``experiments/results/sentiment.json``, three seeds, 24 minutes of one shared core): ``accuracy``
0.759 ± 0.010 (``transfer``), 0.618 ± 0.060 (``scratch``), 0.681 (``prompt``), 0.604 (``majority``); ``macro_f1``
0.751 ± 0.017 and 0.447 ± 0.302 of the first two, undecided: one in three learns something from scratch.

The trained model lies in ``OUT/model``; it labels new texts, one a line, or those of a CSV or JSONL file:

    python -m experiments.sentiment --out runs/sentiment --predict reviews.txt

The snippets are single sentences of reviews, whose labels are those of the whole review: what they say is at times
undecided, and no accuracy near 1 can be had. Public data: ``--data tfds:imdb_reviews``, ``--data tfds:glue/sst2``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import predictions, study, techniques
from experiments.common.classification import Classification, prepare_classification
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import data, pretrained
from jtl.data import text
from jtl.data.batches.loader import Batches
from jtl.data.readers.tables import read_texts
from jtl.errors import InputError
from jtl.model import Model
from jtl.outputs import outputs
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    confident_errors,
    environment,
    summarise,
    write_report,
    write_result,
)
from jtl.tasks import erasure

WORDS = {"rotten": "negative", "fresh": "positive", "neg": "negative", "pos": "positive"}
PROMPT, NOTHING = "Review: {}\nSentiment:", "N/A"
QUICK_LENGTH = 32  # tokens of a text, with --quick
SHOWN = 6  # texts whose words are shaded


@dataclass(frozen=True, kw_only=True)
class Sentiment(Config):
    """Settings of the application."""

    model: str = "minilm"
    """The encoder that is adapted."""
    data: str = "rotten_tomatoes"
    """Labelled texts: rotten_tomatoes, tfds:NAME, a CSV or JSONL file, or a folder; see experiments.finetune."""
    prompted: str | None = "smollm2"
    """The language model that is asked; None leaves it out."""
    words: tuple[str, ...] = ()
    """What it could answer, a word for each class; left out, the names of the classes."""
    train_examples: int = 1024
    """Labelled training texts, stratified; 0 for all there are."""
    test_examples: int = 1000
    """Test texts; 0 for all there are."""
    epochs: int = 4
    """Passes over the training texts."""
    batch_size: int = 16
    """Texts of an update."""
    max_length: int = 64
    """Longest text in tokens; the rest is cut off."""
    text_column: str | None = None
    """Column of the texts in your own file."""
    label_column: str | None = None
    """Column of the labels in your own file."""
    seeds: int = 3
    """Repetitions: other training texts, heads and orders."""
    predict: Path | None = None
    """Texts to label by the model that an earlier run left in --out."""


def run(config: Sentiment) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("epochs", "batch_size", "max_length"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "sentiment")
    ledger = ResumableRows(out, resume=config.resume)
    task = prepare_classification(
        config.model, config.data, max_length=_longest(config), validation=200 if config.quick else 500,
        test=100 if config.quick else config.test_examples or None, text_column=config.text_column,
        label_column=config.label_column, quick=config.quick,
    )  # fmt: skip
    print(task.dataset)
    words = _words(config, task)
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        few = task.with_train(256 if config.quick else config.train_examples or None, seed)
        ledger.get(lambda few=few: (techniques.majority(few), []), arm="majority", seed=seed)
        for arm in ("transfer", "scratch"):
            row = ledger.get(partial(trained, config, few, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")
    if config.prompted is not None:
        row = ledger.get(partial(asked, config, task, words), arm="prompt", seed=config.seed)
        print(f"prompt  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")

    summary = summarise(ledger.rows, ["accuracy", "macro_f1", "seconds"])
    result = Result("sentiment", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Sentiment",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("sentiment", config),
        sections=_sections(task, out, ledger),
        notes=[f"Data: {task.dataset.origin}.", *task.dataset.notes],
    )
    return result


# --- arms ------------------------------------------------------------------------------------------


def trained(
    config: Sentiment, few: Classification, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a network that learns from the labelled texts; keeps the first ``transfer``."""
    budget = techniques.Budget(
        config.epochs, min_steps=1, batch_size=config.batch_size, validations=config.epochs
    )
    if config.quick:
        budget = replace(budget, max_steps=48, validations=2)
    found = techniques.run_arm(few, {"transfer": "full"}.get(arm, arm), seed=seed, budget=budget)
    if arm == "transfer" and seed == config.seed:
        predictions.keep(Path(config.out), found.model, few, found.test)
    return found.row, found.history


def asked(
    config: Sentiment, task: Classification, words: tuple[str, ...]
) -> tuple[dict[str, Any], list[Any]]:
    """The row of a language model that is asked for the class."""
    assert config.prompted is not None
    began = time.monotonic()
    model, tokenizer = pretrained.load(config.prompted), pretrained.tokenizer(config.prompted)
    first = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
    if len(set(first)) < len(first):
        raise InputError(
            f"--words {words}: {config.prompted} begins two of them with the same token; choose others"
        )

    def logits(texts: list[str]) -> np.ndarray:
        cut = tokenizer(texts, truncation=True, max_length=_longest(config))["input_ids"]
        prompts = [PROMPT.format(tokenizer.decode(ids, skip_special_tokens=True)) for ids in cut]
        rows = [{"text": prompt, "label": i} for i, prompt in enumerate(prompts)]
        split = text.encode(rows, tokenizer, _longest(config) + 32)
        found = np.zeros((len(split), len(words)), np.float32)
        lengths = text.best_buckets(split.lengths, 2)  # few: each has a program of its own to compile
        for batch in Batches(split, 16, train=False, buckets=lengths):
            real = batch["weight"] > 0
            found[batch["label"][real]] = np.asarray(_next(model, batch, jnp.array(first)))[real]
        return found

    test = task.dataset.splits["test"]
    found = logits([NOTHING, *(test[i]["text"] for i in range(len(test)))])
    row = techniques.scores(found[1:] - found[0], data.labels(test))
    return {**row, "seconds": time.monotonic() - began, "steps": 0, "trained_parameters": 0}, []


@jax.jit
def _next(model: Model, batch: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities (B, C) of some tokens after the last real one of each text."""
    last = batch["attention_mask"].sum(1) - 1
    said = jnp.take_along_axis(model(batch)["token_logits"], last[:, None, None], 1)[:, 0]
    return jax.nn.log_softmax(said)[:, tokens]


def _longest(config: Sentiment) -> int:
    """The longest text in tokens."""
    return min(config.max_length, QUICK_LENGTH) if config.quick else config.max_length


def _words(config: Sentiment, task: Classification) -> tuple[str, ...]:
    classes = task.dataset.classes
    if config.words and len(config.words) != len(classes):
        raise InputError(
            f"--words {config.words}: expected a word for each class of {classes}, in that order"
        )
    return config.words or tuple(WORDS.get(name, name) for name in classes)


# --- use again -------------------------------------------------------------------------------------


def label(config: Sentiment, path: Path) -> None:
    """Label the texts of a file by the model in ``config.out``; writes predictions.csv there."""
    out = Path(config.out)
    names = predictions.kept_classes(out)
    texts = read_texts(path, config.text_column or "text")
    model, tokenizer = pretrained.load(out / predictions.MODEL), pretrained.tokenizer(out / predictions.MODEL)
    split = text.encode([{"text": t, "label": 0} for t in texts], tokenizer, config.max_length)
    said = outputs(model, Batches(split, min(32, len(texts)), train=False), ("logits",))
    chances = np.asarray(jax.nn.softmax(said["logits"]))
    predictions.write_predictions(out, "text", texts, chances, names)


# --- report ----------------------------------------------------------------------------------------


def _sections(task: Classification, out: Path, ledger: ResumableRows) -> list[Section]:
    test, names = predictions.kept_test(out), task.dataset.classes
    chances = np.asarray(jax.nn.softmax(test["logits"]))
    source = task.dataset.splits["test"]
    texts = [source[i]["text"] for i in range(len(source))]
    chosen, titles = predictions.surest(test["label"], chances, names, SHOWN)
    words, scores = _leans_on(out / predictions.MODEL, [texts[i] for i in chosen])
    return [
        study.transferred_or_scratch(ledger.rows, ("accuracy", "macro_f1")),
        Section(
            "Learning curves",
            "Training loss and validation accuracy.",
            figures.learning_curves(ledger.curves),
        ),
        Section(
            "Confusion",
            "True against predicted, transfer, the first seed.",
            figures.confusion(test["label"], test["logits"].argmax(-1), names),
        ),
        Section(
            "What it leans on",
            "Words whose absence costs the predicted class probability, blue, and gains it some, orange, in the texts "
            "of which the model was surest, rightly and wrongly.",
            figures.attributed(words, scores, titles),
        ),
        Section("Surest errors", confident_errors(texts, test["label"], chances, names)),
    ]


def _leans_on(folder: Path, texts: list[str]) -> tuple[list[list[str]], list[list[float]]]:
    """The words of each text and what the model would lose without them."""
    model, tokenizer = pretrained.load(folder), pretrained.tokenizer(folder)
    encoded = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="np")
    batch = {name: encoded[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    found = np.asarray(jax.jit(erasure)(model, batch))
    words, scores = [], []
    for place, whole in enumerate(texts):
        parts: dict[int, float] = {}
        for word, score in zip(encoded.word_ids(place), found[place], strict=True):
            if word is not None:
                parts[word] = parts.get(word, 0.0) + float(score)
        spans = [encoded.word_to_chars(place, word) for word in parts]
        words.append([whole[span.start : span.end] for span in spans])
        scores.append(list(parts.values()))
    return words, scores


def predict(config: Sentiment) -> None:
    """Label with what was trained."""
    assert config.predict is not None
    label(config, config.predict)


if __name__ == "__main__":
    main(run, Sentiment, predict)
