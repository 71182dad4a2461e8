"""Full fine-tuning beside Hugging Face Trainer (torch): same weights, examples, budget and seeds, in one run.

``step_ratio`` is peer / jtl in seconds an example: above 1, jtl is faster. Trainer pads each batch to its longest text;
``--grouped`` runs it once more with texts grouped by length.

    python -m experiments.benchmarks.finetune --out runs/bench_finetune

Needs the extra ``bench``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import ratio
from experiments.common import Config, above, at_least, finish, main, prepare
from experiments.common.classification import Classification, batches, prepare_classification
from jtl import heads, pretrained
from jtl.data.batches.loader import Batches, loader, padding_waste, plan
from jtl.outputs import predict
from jtl.report import Result, paired_difference, summarise
from jtl.tasks import Classify, accuracy
from jtl.train import adamw, fit, make_step, schedule

ABOUT = """Both start from the same MiniLM files and the same head, see the same examples as often, in batches of one
size, with AdamW (warm-up over a tenth and linear decay, weight decay 0.01, clipping at 1) and the same dropout rates.
Trainer pads each batch to its longest text, as it does by default (trainer), or has texts grouped by length
(trainer_grouped); jtl batches texts of like length in a few static shapes. Time counts training alone: jtl's
compilation is done before and reported apart, Trainer's set-up and evaluation are left out. Runs alternate. step_ratio
is peer / jtl in seconds an example: above 1, jtl is faster."""
PEERS = ("trainer", "trainer_grouped")


@dataclass(frozen=True, kw_only=True)
class Bench(Config):
    """Settings of the benchmark."""

    train_examples: int = at_least(1, 1984)
    """Training examples: a multiple of the batch size, so that both see all of them in each epoch."""
    test_examples: int = at_least(1, 2000)
    """Test examples."""
    epochs: int = at_least(1, 2)
    """Passes over the training examples."""
    batch_size: int = at_least(1, 32)
    """Examples an update."""
    learning_rate: float = above(0, 5e-5)
    """Peak rate of AdamW."""
    seeds: int = at_least(1, 3)
    """Repetitions."""
    grouped: bool = False
    """Also run Trainer with texts grouped by length."""
    threads: int = at_least(1, 2)
    """CPU threads of torch; XLA takes all processors there are."""


def run(config: Bench) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import torch

    began = time.monotonic()
    prepare(config, "bench_finetune")
    torch.set_num_threads(config.threads)
    count, test = (192, 200) if config.quick else (config.train_examples, config.test_examples)
    task = prepare_classification("minilm", "rotten_tomatoes", test=test)
    epochs = 1 if config.quick else config.epochs
    peers = PEERS if config.grouped else PEERS[:1]
    rows: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        few = task.with_train(count, seed)
        model = heads.classifier(few.pretrained, few.classes, key=jax.random.key(seed))
        rows.append({"arm": "jtl", "seed": seed, **_jtl(few, model, epochs, seed, config)})
        print(rows[-1])
        for peer in peers:
            grouped = peer == "trainer_grouped"
            rows.append({"arm": peer, "seed": seed, **_trainer(few, model, epochs, seed, config, grouped)})
            print(rows[-1])
    summary: dict[str, Any] = summarise(rows, ["accuracy", "examples_per_second", "train_seconds"])
    for metric in ("step_ratio", "accuracy_difference"):
        summary[metric] = {}
    for peer in peers:
        summary["step_ratio"][peer] = ratio(rows, "train_seconds", peer)
        summary["accuracy_difference"][peer] = paired_difference(rows, "accuracy", "jtl", peer)
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    return finish(
        "bench_finetune", config, rows, (), title="jtl beside Hugging Face Trainer", about=ABOUT, summary=summary,
        seconds=time.monotonic() - began, versions=versions,
    )  # fmt: skip


def _jtl(task: Classification, model: Any, epochs: int, seed: int, config: Bench) -> dict[str, Any]:
    train = task.splits["train"]
    order = Batches(train, config.batch_size, seed=seed, epochs=epochs)
    step = make_step(Classify(), adamw(schedule(config.learning_rate, len(order))))
    started = time.monotonic()
    state = step.init(model, jax.random.key(seed))
    for length in order.lengths:  # one compilation each
        state, _ = step(
            state, train.batch(np.arange(config.batch_size), length) | _fillers(config.batch_size)
        )
    jax.block_until_ready(state.trained)
    compiled = time.monotonic() - started
    state = step.init(model, jax.random.key(seed))
    started = time.monotonic()
    fitted = fit(step, state, loader(order), steps=len(order), progress=False)
    jax.block_until_ready(fitted.state.trained)
    seconds = time.monotonic() - started
    logits, labels = predict(fitted.state.model, batches(task, "test"))
    waste = padding_waste(train.lengths, plan(train.lengths, config.batch_size, order.lengths, seed, 0))
    return {
        "accuracy": accuracy(logits, labels),
        "train_seconds": seconds,
        "examples_per_second": len(order) * config.batch_size / seconds,
        "compile_seconds": compiled,
        "padding_waste": waste,
        "steps": len(order),
    }


def _fillers(rows: int) -> dict[str, np.ndarray]:
    return {"weight": np.ones(rows, np.float32), "index": np.arange(rows, dtype=np.int32)}


def _trainer(
    task: Classification, model: Any, epochs: int, seed: int, config: Bench, grouped: bool
) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = pretrained.tokenizer("minilm")

    def rows(split: str) -> Any:  # a list, which Trainer takes for a data set
        part = task.splits[split]
        ids = [part.tokens[part.starts[i] : part.starts[i + 1]].tolist() for i in range(len(part))]
        return [{"input_ids": i, "labels": int(y)} for i, y in zip(ids, part.labels, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(model, f"{folder}/start")  # the very weights, the head among them
        peer = transformers.AutoModelForSequenceClassification.from_pretrained(
            f"{folder}/start", trust_remote_code=False
        )
        trainer = transformers.Trainer(
            peer,
            transformers.TrainingArguments(
                output_dir=f"{folder}/run",
                num_train_epochs=epochs,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=64,
                learning_rate=config.learning_rate,
                warmup_steps=round(0.1 * epochs * (len(task.splits["train"]) // config.batch_size)),
                weight_decay=0.01,
                max_grad_norm=1.0,
                lr_scheduler_type="linear",
                train_sampling_strategy="group_by_length" if grouped else "random",
                seed=seed,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows("train"),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        found = trainer.predict(rows("test"))
    steps = trainer.state.global_step
    return {
        "accuracy": accuracy(np.asarray(found.predictions), np.asarray(found.label_ids)),
        "train_seconds": seconds,
        "examples_per_second": steps * config.batch_size / seconds,
        "steps": steps,
    }


if __name__ == "__main__":
    main(run, Bench)
