"""Summarization: write a one-line summary of a text, learned from few examples by a pretrained language model.

``before`` is SmolLM2-135M-Instruct with a prompt in its own chat format; ``transfer`` trains LoRA on its queries and
values (Hu et al. 2021, https://arxiv.org/abs/2106.09685) with the same prompt; ``scratch`` trains the same architecture
from random weights, with as many updates. ``lead`` is the first sentence of the text.

    python -m experiments.summarization --out runs/summarization
    python -m experiments.summarization --out runs/summarization --predict texts.txt

The second command summarises the lines of a text file, or the ``text`` column of a CSV or JSONL file, with the adapter
that the first left in ``OUT/adapter``. The default data are docstrings of installed packages. Public data: ``--data
tfds:xsum``; your own: ``--data my.csv`` with columns ``text`` and ``summary``. T5 works too: ``--model
google/flan-t5-small --prompt "summarize: {text}"``.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import predictions, recipe, study
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, at_least, at_most, prepare
from experiments.data.docstring_summaries import docstring_summaries
from jtl import adapters, data, finetune, pretrained
from jtl.data.batches.loader import Batches
from jtl.data.encode.pairs import Pairs, encode
from jtl.data.readers.tables import read_texts
from jtl.model import Model
from jtl.models.parts import scan
from jtl.outputs import mean_loss
from jtl.report import Result, Section, figures, format_estimate, paired_difference, table
from jtl.tasks import CausalLM, Seq2Seq, generate

ABOUT = """\
``before`` is SmolLM2-135M-Instruct with a prompt in its own chat format; ``transfer`` trains LoRA on its queries and
values (Hu et al. 2021, https://arxiv.org/abs/2106.09685) with the same prompt; ``scratch`` trains the same architecture
from random weights on the same texts, for as many updates. ``lead`` is the first sentence of the text, the usual
baseline. Only tokens of the summary count in the loss; decoding is greedy. Validation picks the checkpoint, which is
tested once; learning rates were not searched. ROUGE (Lin 2004) is that of ``rouge-score``, F1 with stems. The default
data are docstrings: the prose below the first line, with that line as its summary. The line was written above the
prose, not as an abstract of it, and often says what the prose takes for granted, so that no ROUGE near 1 is possible.
NumPy and SciPy are train, Flax is validation, scikit-learn and Optax are test."""
# SmolLM2's chat format, without the system's turn.
CHAT = "<|im_start|>user\nSummarize in one short line:\n{text}<|im_end|>\n<|im_start|>assistant\n"
RATES = {"transfer": 1e-3, "scratch": 5e-4}  # peaks of AdamW, not searched
ADAPTER, WRITTEN = "adapter", "written.json"  # in --out
METRICS = ("rouge1", "rouge2", "rougeL")
SHOWN = 10  # texts of the report


@dataclass(frozen=True, kw_only=True)
class Summarization(Config):
    """Settings of the application."""

    model: str = "smollm2"
    """The language model that is adapted: a causal one, or T5."""
    data: str = "docstrings"
    """Texts with summaries: docstrings, tfds:NAME, a CSV or JSONL file, or a folder of such files."""
    prompt: str = CHAT
    """What the model reads, with the text in the place of {text}."""
    train_examples: int = at_least(0, 200)
    """Training texts; 0 for all there are."""
    test_examples: int = at_least(0, 100)
    """Test texts; 0 for all there are."""
    updates: int = at_least(1, 40)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 4)
    """Texts of an update."""
    max_text: int = at_least(1, 96)
    """Longest text in tokens; the rest is cut off."""
    max_summary: int = at_least(1, 24)
    """Longest summary in tokens."""
    rank: int = at_least(1, 8)
    """Of LoRA."""
    text_column: str | None = None
    """Column of the texts in your own file or a tfds data set."""
    summary_column: str | None = None
    """Column of the summaries there."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training texts, adapters and orders."""
    predict: Path | None = None
    """Texts to summarise with the adapter that an earlier run left in --out."""


def run(config: Summarization) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    out = prepare(config, "summarization")
    rows = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    trainer = Trainer(sizes)
    print(trainer.dataset)
    rows.get(partial(trainer.measured, "lead", sizes.seed), arm="lead", seed=sizes.seed)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = rows.get(partial(trainer.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  ROUGE-L {row['rougeL']:.3f}  {row['seconds']:.0f} s")

    return study.finish(
        "summarization", config, rows, _sections(trainer, rows), title="Summarization", about=ABOUT, metrics=METRICS,
        notes=[f"Data: {trainer.dataset.origin}.", *trainer.dataset.notes],
    )  # fmt: skip


def shortened(config: Summarization) -> Summarization:
    """The settings of ``--quick``."""
    return at_most(
        config, train_examples=16, test_examples=6, updates=6, batch_size=2, max_text=48, max_summary=16, seeds=1
    )  # fmt: skip


def _dataset(config: Summarization) -> data.Dataset:
    if config.data == "docstrings":
        return docstring_summaries()
    columns = {"text_column": config.text_column, "summary_column": config.summary_column}
    return data.load(config.data, "summaries", **columns)


class Trainer:
    """A language model, texts with summaries, and the arms that learn from them."""

    def __init__(self, config: Summarization, dataset: data.Dataset | None = None) -> None:
        self.config, self.out = config, Path(config.out)
        self.dataset = dataset or _dataset(config)
        self.tokenizer = pretrained.tokenizer(config.model)
        limits = {"validation": 2 if config.quick else 32, "test": config.test_examples}
        self.examples = {split: self._some(split, limit, 0) for split, limit in limits.items()}

    def _some(self, split: str, count: int, seed: int) -> list[Any]:
        source = self.dataset.splits[split]
        chosen = np.random.default_rng(seed).permutation(len(source))[: count or None]
        return [source[int(i)] for i in chosen]

    @cached_property
    def model(self) -> Model:
        """The pretrained model."""
        return pretrained.load(self.config.model)

    @property
    def start_id(self) -> int | None:
        """With which a decoder behind an encoder begins; None for a causal model."""
        return getattr(self.model.config, "decoder_start_token_id", None)

    def encoded(self, examples: list[Any]) -> Pairs:
        """Texts and summaries as tokens."""
        return encode(
            examples, self.tokenizer, prompt=self.config.prompt, max_text=self.config.max_text,
            max_answer=self.config.max_summary, start_id=self.start_id,
        )  # fmt: skip

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm on test, and its learning curve; stores the summaries of the first seed."""
        began, examples = time.monotonic(), self.examples["test"]
        curve: list[dict[str, Any]] = []
        if arm == "lead":
            written = [re.split(r"(?<=[.!?])\s", one["text"])[0] for one in examples]
        else:
            model = self.model
            if arm != "before":
                model, curve = self.trained(arm, seed)
            written = self.write(model, examples)
        if seed == self.config.seed:
            predictions.keep_texts(self.out / WRITTEN, examples, arm, written)
        return {**rouge(written, examples), "seconds": time.monotonic() - began}, curve

    def trained(self, arm: str, seed: int) -> tuple[Model, list[dict[str, Any]]]:
        """The model after training, and its learning curve; stores the first adapter."""
        config = self.config
        train = self.encoded(self._some("train", config.train_examples, seed))
        size, steps = min(config.batch_size, len(train)), config.updates
        init_key, run_key = jax.random.split(jax.random.key(seed))
        # A stack of 30 layers compiles as fast as one; the unrolled form writes, by one program for all arms.
        if arm == "transfer":
            model = adapters.lora(scan.stack(self.model), rank=config.rank, key=init_key)
            labels: Any = finetune.train_only(model, ".*/lora/.*")
        else:
            model = scan.stack(pretrained.scratch(config.model, key=init_key))
            labels = None
        loss: Any = CausalLM(mask="continuation") if self.start_id is None else Seq2Seq()
        validation = self.encoded(self.examples["validation"])
        longest = max(int(part.lengths.max()) for part in (train, validation))
        buckets = (-(-longest // 8) * 8,)
        held_out = list(Batches(validation, size, train=False, buckets=buckets))
        fitted = recipe.train(
            recipe.Recipe(model, loss, Batches(train, size, seed=seed, steps=steps, buckets=buckets), labels),
            steps=steps,
            rate=RATES[arm],
            seed=run_key,
            validate=lambda model: {"loss": mean_loss(loss, model, held_out, weight="tokens")[0]},
            validate_every=-(-steps // (1 if config.quick else 2)),
            metric="loss",
            mode="min",
        )
        if arm == "scratch":
            return scan.unstack(fitted.model), fitted.history
        adapted = adapters.lora(self.model, rank=config.rank, key=init_key)
        adapted = adapted.with_params(scan.unstacked(fitted.model.params))
        if seed == config.seed:
            shutil.rmtree(self.out / ADAPTER, ignore_errors=True)  # of a run that was killed
            adapters.peft.save(adapted, self.out / ADAPTER)
        return adapters.merge(adapted), fitted.history

    def write(self, model: Model, examples: list[Any], rows: int = 25) -> list[str]:
        """The model's summary of each text: the first line of its greedy continuation."""
        pairs = self.encoded(examples)
        rows = min(rows, len(pairs))
        length = -(-int(pairs.prompt_lengths.max()) // 8) * 8
        written = []
        for first in range(0, len(pairs), rows):
            own = np.minimum(np.arange(first, first + rows), len(pairs) - 1)  # the last batch is filled up
            batch = pairs.prompt(own, length)
            new = generate(
                model,
                *((None,) if self.start_id is not None else (batch["input_ids"], batch["attention_mask"])),
                encoder=batch if self.start_id is not None else None,
                max_new_tokens=self.config.max_summary,
                eos_id=self.tokenizer.eos_token_id,
            )
            texts = self.tokenizer.batch_decode(np.asarray(new), skip_special_tokens=True)
            written += [(text.strip().splitlines() or [""])[0] for text in texts[: len(pairs) - first]]
        return written


def rouge(written: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stems, in [0, 1], by ``rouge-score``."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    found = [scorer.score(one["summary"], text) for one, text in zip(examples, written, strict=True)]
    return {metric: float(np.mean([own[metric].fmeasure for own in found])) for metric in METRICS}


# --- use again -------------------------------------------------------------------------------------


def predict(config: Summarization) -> None:
    """Summarise the texts of a file with the adapter in ``config.out``; writes predictions.json there."""
    assert config.predict is not None
    out = Path(config.out)
    adapter = predictions.trained(out / ADAPTER)
    texts = [{"text": text} for text in read_texts(config.predict, config.text_column or "text")]
    config = shortened(config) if config.quick else config
    splits = {split: texts for split in data.dataset.SPLITS}
    trainer = Trainer(config, data.Dataset(str(config.predict), "summary", splits, (), "", ""))
    model = adapters.merge(adapters.peft.load(trainer.model, adapter))
    written = trainer.write(model, texts, rows=8)
    rows = [{**one, "summary": text} for one, text in zip(texts, written, strict=True)]
    predictions.write_json(out, rows, "{summary}", "texts summarised")


# --- report ----------------------------------------------------------------------------------------


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    own = [row for row in rows.rows if row["arm"] == "transfer"]
    lines = []
    for fixed in (row for row in rows.rows if row["arm"] in ("before", "lead")):
        paired = [*own, *({**fixed, "seed": row["seed"]} for row in own)]
        found = (paired_difference(paired, metric, "transfer", fixed["arm"]) for metric in METRICS)
        lines.append([fixed["arm"], *map(format_estimate, found)])
    written = json.loads((trainer.out / WRITTEN).read_text(encoding="utf-8"))
    shown = [
        [_short(row["text"]), *(row[what] for what in ("summary", "before", "transfer", "scratch"))]
        for row in written[:SHOWN]
    ]
    return [
        study.transferred_or_scratch(rows.rows, METRICS),
        Section(
            "Transferred, less what trains nothing",
            "These arms have one value, which stands against every seed.\n\n"
            + table(["less", *METRICS], lines),
        ),
        Section(
            "Learning curves",
            "Training and validation loss in nats per token of the summary.",
            figures.learning_curves(rows.curves, "validation_loss"),
        ),
        Section(
            "Before and after",
            "The first test texts in random order, not selected; arms of the first seed.\n\n"
            + table(["text", "its first line", "before", "transfer", "scratch"], shown),
        ),
    ]


def _short(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


if __name__ == "__main__":
    main(run, Summarization, predict)
