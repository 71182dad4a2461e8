"""Sentiment: is a film review positive or negative? Fine-tunes MiniLM on few labelled texts.

``transfer`` fine-tunes the pretrained encoder on ``--train-examples`` labelled texts; ``scratch`` trains the same
architecture from random weights, with as many updates. ``prompt`` trains nothing: it asks a language model, with
the calibration of Zhao et al. 2021 (https://arxiv.org/abs/2102.09690). ``majority`` predicts the commonest class.

    python -m experiments.sentiment --out runs/sentiment
    python -m experiments.sentiment --out runs/sentiment --predict reviews.txt

The second command labels texts, one a line, or those of a CSV or JSONL file, with the model that the first left in
``OUT/model``. The default data are single sentences that have the label of their whole review. Public data: ``--data
tfds:imdb_reviews``, ``--data tfds:glue/sst2``; your own: ``--data my.csv`` with columns ``text`` and ``label``.
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

from experiments.common import Config, ResumableRows, at_least, main, predictions, prepare, study, techniques
from experiments.common.classification import Classification, prepare_classification
from jtl import data, pretrained
from jtl.data import text
from jtl.data.batches.loader import Batches
from jtl.data.readers.tables import read_texts
from jtl.errors import InputError
from jtl.model import Model
from jtl.outputs import outputs
from jtl.report import Result, Section, confident_errors, figures
from jtl.tasks import erasure

ABOUT = """\
``transfer`` fine-tunes MiniLM on ``--train-examples`` labelled texts; ``scratch`` trains the same architecture from
random weights on the same texts, for as many updates. ``prompt`` trains nothing: SmolLM2 reads the text and
"Sentiment:", and predicts the class whose word gains most in probability over a prompt without a text (Zhao et al.
2021, "Calibrate Before Use", https://arxiv.org/abs/2102.09690). ``majority`` predicts the commonest class. Validation
picks the checkpoint, which is tested once. The default data are single sentences that have the label of their whole
review: some are undecided, so that no accuracy near 1 is possible."""

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
    """The language model that is prompted; None leaves it out."""
    words: tuple[str, ...] = ()
    """Its possible answers, a word for each class; left out, the names of the classes."""
    train_examples: int = at_least(0, 1024)
    """Labelled training texts, stratified; 0 for all there are."""
    test_examples: int = at_least(0, 1000)
    """Test texts; 0 for all there are."""
    epochs: int = at_least(1, 4)
    """Passes over the training texts."""
    batch_size: int = at_least(1, 16)
    """Texts of an update."""
    max_length: int = at_least(1, 64)
    """Longest text in tokens; the rest is cut off."""
    text_column: str | None = None
    """Column of the texts in your own file."""
    label_column: str | None = None
    """Column of the labels in your own file."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training texts, heads and orders."""
    predict: Path | None = None
    """Texts to label by the model that an earlier run left in --out."""


def run(config: Sentiment) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "sentiment")
    rows = ResumableRows(out, resume=config.resume)
    task = prepare_classification(
        config.model, config.data, max_length=_longest(config), validation=200 if config.quick else 500,
        test=100 if config.quick else config.test_examples or None, text_column=config.text_column,
        label_column=config.label_column, quick=config.quick,
    )  # fmt: skip
    print(task.dataset)
    words = _words(config, task)
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        few = task.with_train(256 if config.quick else config.train_examples or None, seed)
        rows.get(partial(baseline, few), arm="majority", seed=seed)
        for arm in ("transfer", "scratch"):
            row = rows.get(partial(trained, config, few, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")
    if config.prompted is not None:
        row = rows.get(partial(prompted, config, task, words), arm="prompt", seed=config.seed)
        print(f"prompt  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")

    return study.finish(
        "sentiment", config, rows, _sections(task, out, rows), title="Sentiment", about=ABOUT,
        metrics=("accuracy", "macro_f1"), notes=[f"Data: {task.dataset.origin}.", *task.dataset.notes],
    )  # fmt: skip


# --- arms ------------------------------------------------------------------------------------------


def baseline(few: Classification) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of the commonest class."""
    return techniques.majority(few), []


def trained(
    config: Sentiment, few: Classification, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a trained arm; stores the first ``transfer``."""
    budget = techniques.Budget(
        config.epochs, min_steps=1, batch_size=config.batch_size, validations=config.epochs
    )
    if config.quick:
        budget = replace(budget, max_steps=48, validations=2)
    found = techniques.run_arm(few, {"transfer": "full"}.get(arm, arm), seed=seed, budget=budget)
    if arm == "transfer" and seed == config.seed:
        predictions.keep(Path(config.out), found.model, few, found.test)
    return found.row, found.history


def prompted(
    config: Sentiment, task: Classification, words: tuple[str, ...]
) -> tuple[dict[str, Any], list[Any]]:
    """The row of a language model that is prompted for the class."""
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
    logits = jnp.take_along_axis(model(batch)["token_logits"], last[:, None, None], 1)[:, 0]
    return jax.nn.log_softmax(logits)[:, tokens]


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


def predict(config: Sentiment) -> None:
    """Label the texts of a file with the model in ``config.out``; writes predictions.csv there."""
    assert config.predict is not None
    out = Path(config.out)
    names = predictions.kept_classes(out)
    texts = read_texts(config.predict, config.text_column or "text")
    model, tokenizer = pretrained.load(out / predictions.MODEL), pretrained.tokenizer(out / predictions.MODEL)
    split = text.encode([{"text": t, "label": 0} for t in texts], tokenizer, config.max_length)
    found = outputs(model, Batches(split, min(32, len(texts)), train=False), ("logits",))
    predictions.write_labels(out, "text", texts, np.asarray(jax.nn.softmax(found["logits"])), names)


# --- report ----------------------------------------------------------------------------------------


def _sections(task: Classification, out: Path, rows: ResumableRows) -> list[Section]:
    test, names = predictions.kept_test(out), task.dataset.classes
    probabilities = np.asarray(jax.nn.softmax(test["logits"]))
    source = task.dataset.splits["test"]
    texts = [source[i]["text"] for i in range(len(source))]
    chosen, titles = predictions.surest(test["label"], probabilities, names, SHOWN)
    words, scores = _word_scores(out / predictions.MODEL, [texts[i] for i in chosen])
    return [
        study.transferred_or_scratch(rows.rows, ("accuracy", "macro_f1")),
        Section(
            "Learning curves",
            "Training loss and validation accuracy.",
            figures.learning_curves(rows.curves),
        ),
        Section(
            "Confusion",
            "True against predicted, transfer, the first seed.",
            figures.confusion(test["label"], test["logits"].argmax(-1), names),
        ),
        Section(
            "What it leans on",
            "Words whose removal lowers the probability of the predicted class, blue, or raises it, orange, in the "
            "texts that the model was most confident about, right and wrong ones.",
            figures.attributed(words, scores, titles),
        ),
        Section("Surest errors", confident_errors(texts, test["label"], probabilities, names)),
    ]


def _word_scores(folder: Path, texts: list[str]) -> tuple[list[list[str]], list[list[float]]]:
    """The words of each text, and how much probability of the predicted class each of them adds."""
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


if __name__ == "__main__":
    main(run, Sentiment, predict)
