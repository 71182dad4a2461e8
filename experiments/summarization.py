"""Summarization: a text in one line, learned from few examples by a pretrained language model.

``before`` asks SmolLM2-135M-Instruct as it is, in its own chat format; ``transfer`` trains LoRA on its queries and
values (Hu et al. 2021, https://arxiv.org/abs/2106.09685), from the same prompt; ``scratch`` trains all of the same
architecture from random weights, on the same texts for as many updates. ``lead`` is the first sentence of the text, the
usual baseline. Only the tokens of the summary count in the loss, and summaries are written greedily. The better of two
validations is kept, and tested once; learning rates were not searched.

    python -m experiments.summarization --out runs/summarization

Expected (``experiments/results/summarization.json``, three seeds, 26 minutes on two cores): ``rouge1`` 0.190
(``before``), 0.255 ± 0.024 (``transfer``), 0 (``scratch``, which learns no language from so little), 0.208 (``lead``);
``rougeL`` 0.164, 0.238 ± 0.018, 0 and 0.182. ``transfer`` writes a line where ``before`` repeats the text.

The trained adapter lies in ``OUT/adapter``, as PEFT has them; it summarises the lines of a text file, or the ``text``
column of a CSV or JSONL file:

    python -m experiments.summarization --out runs/summarization --predict texts.txt

The default data are docstrings of installed packages: the prose below the first line, and that line as its summary. The
line was written above the prose, not as an abstract of it, and often says what the prose takes for granted, so that no
ROUGE near 1 can be had. NumPy and SciPy are train, Flax is validation, and test is scikit-learn and Optax, of which
train holds nothing. Public data: ``--data tfds:xsum``; your own: ``--data my.csv`` with columns ``text`` and
``summary``. T5 works too, by a folder or a hub id: ``--model google/flan-t5-small --prompt "summarize: {text}"``.

ROUGE (Lin 2004) is that of ``rouge-score``, F1 with stems.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from experiments.common.study import transferred_or_scratch
from experiments.data.docstring_summaries import docstring_summaries
from jtl import adapters, data, finetune, pretrained
from jtl._files import write_file
from jtl.data.batches.loader import Batches, loader
from jtl.data.encode.pairs import Pairs, encode
from jtl.data.readers.tables import read_texts
from jtl.errors import InputError
from jtl.model import Model
from jtl.models import scan
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    format_estimate,
    paired_difference,
    summarise,
    table,
    write_report,
    write_result,
)
from jtl.report.result import to_json
from jtl.tasks import CausalLM, Seq2Seq, generate
from jtl.train import adamw, fit, make_step, schedule

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
    train_examples: int = 200
    """Training texts; 0 for all there are."""
    test_examples: int = 100
    """Test texts; 0 for all there are."""
    updates: int = 40
    """Updates of transfer and of scratch."""
    batch_size: int = 4
    """Texts of an update."""
    max_text: int = 96
    """Longest text in tokens; the rest is cut off."""
    max_summary: int = 24
    """Longest summary in tokens."""
    rank: int = 8
    """Of LoRA."""
    text_column: str | None = None
    """Column of the texts in your own file or a tfds data set."""
    summary_column: str | None = None
    """Column of the summaries there."""
    seeds: int = 3
    """Repetitions: other training texts, adapters and orders."""
    predict: Path | None = None
    """Texts to summarise by the adapter that an earlier run left in --out."""


def run(config: Summarization) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("updates", "batch_size", "max_text", "max_summary", "rank"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    out = prepare(config, "summarization")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    writer = Trainer(sizes)
    print(writer.dataset)
    ledger.get(partial(writer.measured, "lead", sizes.seed), arm="lead", seed=sizes.seed)
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("before", "transfer", "scratch") if seed == sizes.seed else ("transfer", "scratch"):
            row = ledger.get(partial(writer.measured, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  ROUGE-L {row['rougeL']:.3f}  {row['seconds']:.0f} s")

    summary = summarise(ledger.rows, [*METRICS, "seconds"])
    result = Result("summarization", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Summarization",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("summarization", config),
        sections=_sections(writer, ledger),
        notes=[f"Data: {writer.dataset.origin}.", *writer.dataset.notes],
    )
    return result


def shortened(config: Summarization) -> Summarization:
    """The settings of ``--quick``."""
    few = {
        "train_examples": 16,
        "test_examples": 6,
        "updates": 6,
        "batch_size": 2,
        "max_text": 48,
        "max_summary": 16,
    }
    return replace(
        config, seeds=1, **{name: min(most, getattr(config, name) or most) for name, most in few.items()}
    )


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
        """The row of an arm on test, and its learning curve; keeps what the first seed writes."""
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
            self._keep(arm, examples, written)
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
        step = make_step(loss, adamw(schedule(RATES[arm], steps)), labels)
        validation = self.encoded(self.examples["validation"])
        longest = max(int(part.lengths.max()) for part in (train, validation))
        buckets = (-(-longest // 8) * 8,)
        held_out = list(Batches(validation, size, train=False, buckets=buckets))
        fitted = fit(
            step,
            step.init(model, run_key),
            loader(Batches(train, size, seed=seed, steps=steps, buckets=buckets)),
            steps=steps,
            validate=lambda model: {"loss": _mean_loss(loss, model, held_out)},
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
        """What the model writes of each text: its first line, greedily."""
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

    def _keep(self, arm: str, examples: list[Any], written: list[str]) -> None:
        path = self.out / WRITTEN
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else examples
        rows = [{**one, arm: text} for one, text in zip(before, written, strict=True)]
        write_file(path, to_json(rows))


@jax.jit
def _loss(loss: Any, model: Model, batch: Any) -> tuple[jax.Array, jax.Array]:
    value, metrics = loss.value(model, model(batch), batch, None)
    return value, metrics["tokens"]


def _mean_loss(loss: Any, model: Model, batches: Sequence[Any]) -> float:
    """Mean loss of a token of the summaries, in nats."""
    found = np.array([_loss(loss, model, batch) for batch in batches], np.float64)
    return float(np.average(found[:, 0], weights=found[:, 1]))


def rouge(written: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stems, in [0, 1], by ``rouge-score``."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    found = [scorer.score(one["summary"], text) for one, text in zip(examples, written, strict=True)]
    return {metric: float(np.mean([own[metric].fmeasure for own in found])) for metric in METRICS}


# --- use again -------------------------------------------------------------------------------------


def summarise_file(config: Summarization, path: Path) -> None:
    """Summarise the texts of a file by the adapter in ``config.out``; writes predictions.json there."""
    out = Path(config.out)
    if not (out / ADAPTER).is_dir():
        raise FileNotFoundError(
            f"--predict needs a trained adapter, and {out / ADAPTER} is none: run without --predict first"
        )
    texts = [{"text": text} for text in read_texts(path, config.text_column or "text")]
    config = shortened(config) if config.quick else config
    writer = Trainer(
        config, data.Dataset(str(path), "summary", {s: texts for s in data.dataset.SPLITS}, (), "", "")
    )
    model = adapters.merge(adapters.peft.load(writer.model, out / ADAPTER))
    written = writer.write(model, texts, rows=8)
    rows = [{**one, "summary": text} for one, text in zip(texts, written, strict=True)]
    write_file(out / "predictions.json", to_json(rows))
    for text in written[:20]:
        print(text)
    print(f"{len(rows)} texts summarised: {out / 'predictions.json'}")


# --- report ----------------------------------------------------------------------------------------


def _sections(writer: Trainer, ledger: ResumableRows) -> list[Section]:
    rows = json.loads((writer.out / WRITTEN).read_text(encoding="utf-8"))
    known = [row for row in ledger.rows if row["arm"] in ("before", "lead")]
    lines = []
    for fixed in known:
        own = [row for row in ledger.rows if row["arm"] == "transfer"]
        paired = [*own, *({**fixed, "seed": row["seed"]} for row in own)]
        found = [
            format_estimate(paired_difference(paired, metric, "transfer", fixed["arm"])) for metric in METRICS
        ]
        lines.append([fixed["arm"], *found])
    shown = [
        [_short(row["text"]), *(row[what] for what in ("summary", "before", "transfer", "scratch"))]
        for row in rows[:SHOWN]
    ]
    return [
        transferred_or_scratch(ledger.rows, METRICS),
        Section(
            "Transferred, less what trains nothing",
            "These arms have one value, which stands against every seed.\n\n"
            + table(["less", *METRICS], lines),
        ),
        Section(
            "Learning curves",
            "Training loss, and that of validation, in nats a token of the summary.",
            figures.learning_curves(ledger.curves, "validation_loss"),
        ),
        Section(
            "Before and after",
            "Test texts in the order of the draw, not chosen; arms of the first seed.\n\n"
            + table(["text", "its first line", "before", "transfer", "scratch"], shown),
        ),
    ]


def _short(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def predict(config: Summarization) -> None:
    """Summarise with what was trained."""
    assert config.predict is not None
    summarise_file(config, config.predict)


if __name__ == "__main__":
    main(run, Summarization, predict)
