"""LoRA beside PEFT (torch): same MiniLM weights, head, adapters, batches and optimiser, in one run.

``step_ratio`` is peer / jtl in seconds an example: above 1, jtl is faster. ``memory_ratio`` is peer / jtl in the peak
of what a step holds; ``flops_over_minimum`` compares the compiled step with the least that it could need.

    python -m experiments.benchmarks.lora --out runs/bench_lora

Needs the extras ``bench`` and ``parity``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import ratio, timed_updates
from experiments.common import Config, at_least, finish, main, prepare
from experiments.common.classification import Classification, prepare_classification
from jtl import adapters, finetune, heads, measure, pretrained, tree
from jtl.data.batches.loader import Batches, loader
from jtl.model import Model
from jtl.report import Result, Section, summarise, table
from jtl.tasks import Classify
from jtl.train import Step, adamw, make_step

ABOUT = """Rank 8 on queries and values, with a trainable head; AdamW, clipping at 1, the same dropout rates; both start
from the very same leaves. Two workloads: batches of texts of 128 tokens (fixed), and an epoch of real snippets, where
jtl batches texts of like length in a few static shapes and PEFT pads each random batch to its longest text
(rotten_tomatoes). Rounds alternate between the two; jtl's compilation is done before. step_ratio is peer / jtl in
seconds an example: above 1, jtl is faster. memory_ratio is peer / jtl in the peak of what a fixed step holds: the
parameters and torch's allocations as its profiler counts them, and the compiled program's own figures.
flops_over_minimum is exact: the compiled step against one that trains the biases of the same layers, which needs the
forward and the gradients of their outputs and nothing else, plus the low-rank products."""
RANK, RATE, LENGTH = 8, 1e-3, 128
WHERE = ".*/(query|value)"


@dataclass(frozen=True, kw_only=True)
class BenchLora(Config):
    """Settings of the benchmark."""

    batch_size: int = at_least(1, 32)
    """Texts an update."""
    fixed_steps: int = at_least(1, 5)
    """Updates of a round of ``fixed``."""
    train_examples: int = at_least(1, 640)
    """Snippets of a round of ``rotten_tomatoes``."""
    rounds: int = at_least(1, 5)
    """Rounds of each workload."""
    threads: int = at_least(1, 2)
    """CPU threads of torch; XLA takes all processors there are."""


def run(config: BenchLora) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import peft
    import torch
    import transformers

    began = time.monotonic()
    prepare(config, "bench_lora")
    torch.set_num_threads(config.threads)
    rounds, count = (2, 128) if config.quick else (config.rounds, config.train_examples)
    task = prepare_classification("minilm", "rotten_tomatoes", validation=200, test=200).with_train(
        count, config.seed
    )
    model = heads.classifier(task.pretrained, task.classes, key=jax.random.key(config.seed))
    model = adapters.lora(model, rank=RANK, where=WHERE, key=jax.random.key(config.seed + 1))
    labels = finetune.train_only(model, "(.*/)?lora/.*|head/.*")
    step = make_step(Classify(), adamw(RATE, weight_decay=0.01), labels)
    theirs = _peer(model)
    fixed = _fixed(model, config.batch_size, config.seed)
    epochs = Batches(
        task.splits["train"], config.batch_size, seed=config.seed, epochs=rounds, buckets=task.buckets
    )

    started = time.monotonic()
    state = step.init(model, jax.random.key(config.seed))
    for batch in (fixed, *({b["input_ids"].shape: b for b in epochs}).values()):
        state, _ = step(state, batch)
    jax.block_until_ready(state.trained)
    compiled = time.monotonic() - started
    state, _ = timed_updates(step, state, [fixed] * 2)
    _torch_round(theirs, [fixed] * 2)

    rows: list[dict[str, Any]] = []
    own = iter(loader(epochs))
    for i in range(rounds):
        texts = _texts(task, config.batch_size, seed=(config.seed, i))
        steps = 2 if config.quick else config.fixed_steps
        work = {
            "fixed": ([fixed] * steps, [fixed] * steps),
            "rotten_tomatoes": ([next(own) for _ in range(epochs.steps_per_epoch)], texts),
        }
        for name, (ours, others) in work.items():
            state, jtl_seconds = timed_updates(step, state, ours)
            peft_seconds = _torch_round(theirs, others)
            for arm, seconds in (("jtl", jtl_seconds), ("peft", peft_seconds)):
                rows.append(
                    {"arm": arm, "seed": i, "workload": name, "seconds": seconds,
                     "examples_per_second": len(ours) * config.batch_size / seconds}
                )  # fmt: skip
            print(f"round {i + 1}  {name}: peft / jtl {peft_seconds / jtl_seconds:.2f}")

    memory = {
        "jtl": float(measure.memory(step.lower(model, fixed).compile())),
        "peft": _torch_memory(theirs, fixed),
    }
    flops = _flops(step, model, fixed)
    summary: dict[str, Any] = {"step_ratio": {}}
    for name in ("fixed", "rotten_tomatoes"):
        of = [row for row in rows if row["workload"] == name]
        summary["step_ratio"][name] = ratio(of, "seconds", "peft")
        summary[f"examples_per_second_{name}"] = summarise(of, ["examples_per_second"])["examples_per_second"]
    exact = lambda value: {"mean": value, "ci95": None, "n": 1}  # noqa: E731
    summary["peak_memory"] = {arm: exact(size) for arm, size in memory.items()}
    summary["memory_ratio"] = {"peft": exact(memory["peft"] / memory["jtl"])}
    summary["flops_over_minimum"] = {name: exact(flops[name] / flops["minimum"]) for name in ("lora", "full")}
    versions = {
        **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
        "compile_seconds": compiled,
    }
    lines = [[name, f"{value / 1e9:.2f}", f"{value / flops['minimum']:.3f}"] for name, value in flops.items()]
    return finish(
        "bench_lora", config, rows,
        [Section("Operations of a fixed step", table(["step", "GFLOP", "over the minimum"], lines))],
        title="LoRA in jtl beside PEFT", about=ABOUT, summary=summary, seconds=time.monotonic() - began,
        versions=versions,
    )  # fmt: skip


def _fixed(model: Model, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of texts that fill ``LENGTH`` tokens."""
    draw = np.random.default_rng(seed)
    return {
        "input_ids": draw.integers(1000, model.config.vocab_size, (rows, LENGTH), dtype=np.int32),
        "attention_mask": np.ones((rows, LENGTH), np.int32),
        "label": draw.integers(0, 2, rows, dtype=np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def _texts(task: Classification, size: int, seed: Any) -> list[dict[str, np.ndarray]]:
    """An epoch of random batches, each padded to its longest text, as torch's loaders do."""
    train = task.splits["train"]
    order = np.random.default_rng(seed).permutation(len(train))
    order = order[: len(order) // size * size].reshape(-1, size)
    return [train.batch(rows, int(train.lengths[rows].max()), None) for rows in order]


def _peer(model: Model) -> tuple[Any, Any]:
    """PEFT's model with our very leaves, opened from our own files, and its optimiser."""
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(adapters.merge(model), Path(folder) / "base")
        adapters.peft.save(model, Path(folder) / "adapter")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            Path(folder) / "base", trust_remote_code=False
        )
        theirs = peft.PeftModel.from_pretrained(base, str(Path(folder) / "adapter"), is_trainable=True)
    theirs.train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    ours = sum(
        leaf.size
        for path, leaf in tree.flatten(model.params).items()
        if "/lora/" in path or path.startswith("head/")
    )
    if (count := sum(p.numel() for p in trained)) != ours:
        raise RuntimeError(f"PEFT trains {count} parameters, jtl {ours}: not the same work")
    return theirs, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)


def _torch_round(theirs: tuple[Any, Any], batches: Sequence[Any]) -> float:
    import torch

    model, optimizer = theirs
    started = time.monotonic()
    for batch in batches:
        fields = {name: torch.from_numpy(batch[name]).long() for name in ("input_ids", "attention_mask")}
        loss = model(**fields, labels=torch.from_numpy(batch["label"]).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - started


def _torch_memory(theirs: tuple[Any, Any], batch: Any) -> float:
    """Bytes that a step holds at its peak: parameters, the optimiser's state and what the profiler saw allocated."""
    import json

    import torch

    model, optimizer = theirs
    held = [*model.parameters(), *model.buffers()]
    held += [leaf for own in optimizer.state.values() for leaf in own.values() if torch.is_tensor(leaf)]
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as seen:
        _torch_round(theirs, [batch])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    peak = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    return float(peak + sum(leaf.numel() * leaf.element_size() for leaf in held))


def _flops(step: Step, model: Model, batch: Any) -> dict[str, float]:
    """Operations of compiled steps on ``batch``: LoRA, the least it could need, and full fine-tuning."""

    def count(step: Step, model: Model) -> float:
        return measure.flops(step.lower(model, batch).compile())

    plain = adapters.merge(model)
    layers = [site for t in model.techniques if isinstance(t, adapters.Adapter) for site in t.sites]
    biases = finetune.train_only(plain, f"({WHERE})/bias|head/.*")
    tokens = batch["input_ids"].size
    # Forward x A B; backward dy B', x' (dy B'), (dy B') A' and (x A)' dy.
    products = sum(tokens * 2 * RANK * (3 * site.rows + 3 * site.columns) for site in layers)
    least = count(make_step(Classify(), step.optimizer, biases), plain) + products
    return {
        "minimum": least,
        "lora": count(step, model),
        "full": count(make_step(Classify(), step.optimizer), plain),
    }


if __name__ == "__main__":
    main(run, BenchLora)
