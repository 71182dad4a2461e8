"""LoRA beside PEFT (torch): same MiniLM weights, head, adapters, batches and optimiser, in one run.

Rank 8 on queries and values, with a trainable head; AdamW (1e-3), clipping at 1, the same dropout rates; both start
from the very same leaves. Two workloads: batches of ``--batch-size`` texts of 128 tokens (``fixed``), and an epoch of
real snippets, where jtl batches texts of like length in a few static shapes and PEFT pads each random batch to its
longest text (``rotten_tomatoes``). Rounds alternate between the two; jtl's compilation is done before.

    python -m experiments.benchmarks.lora --out runs/bench_lora

Expected on two CPU cores (``experiments/results/bench_lora.json``): ``step_ratio`` 1.65 ± 0.04 and 2.37 ± 0.04,
``memory_ratio`` 1.13, ``flops_over_minimum`` 1.00 (full fine-tuning 1.48), in 3 minutes. An earlier run, on another
machine of two cores, found 1.13 ± 0.07 and 1.60 ± 0.06.

Needs the extras ``bench`` and ``parity``. ``step_ratio`` is peer / jtl in seconds an example: above 1, jtl is faster.
``memory_ratio`` is peer / jtl in the peak of what a fixed step holds: the parameters and torch's allocations as its
profiler counts them, and the compiled program's own figures. ``flops_over_minimum`` is exact: the compiled step against
one that trains the biases of the same layers, which needs the forward and the gradients of their outputs and nothing
else, plus the low-rank products.
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

from experiments.common.classification import Classification, prepare_classification
from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from jtl import adapters, finetune, heads, pretrained, tree
from jtl.data.batches.loader import Batches, loader
from jtl.model import Model
from jtl.report.report import (
    Result,
    Section,
    environment,
    estimate,
    summarise,
    table,
    write_report,
    write_result,
)
from jtl.tasks import Classify
from jtl.train import Step, adamw, make_step

RANK, RATE, LENGTH = 8, 1e-3, 128
WHERE = ".*/(query|value)"


@dataclass(frozen=True, kw_only=True)
class BenchLora(Config):
    """Settings of the benchmark."""

    batch_size: int = 32
    """Texts an update."""
    fixed_steps: int = 5
    """Updates of a round of ``fixed``."""
    train_examples: int = 640
    """Snippets of a round of ``rotten_tomatoes``."""
    rounds: int = 5
    """Rounds of each workload."""
    threads: int = 2
    """CPU threads of torch; XLA takes all processors there are."""


def run(config: BenchLora) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import peft
    import torch
    import transformers

    began = time.monotonic()
    out = prepare(config, "bench_lora")
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
    state, _ = _jax_round(step, state, [fixed] * 2)
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
            state, jtl_seconds = _jax_round(step, state, ours)
            peft_seconds = _torch_round(theirs, others)
            for arm, seconds in (("jtl", jtl_seconds), ("peft", peft_seconds)):
                rows.append(
                    {"arm": arm, "seed": i, "workload": name, "seconds": seconds,
                     "examples_per_second": len(ours) * config.batch_size / seconds}
                )  # fmt: skip
            print(f"round {i + 1}  {name}: peft / jtl {peft_seconds / jtl_seconds:.2f}")

    memory = {"jtl": _jax_memory(step, model, fixed), "peft": _torch_memory(theirs, fixed)}
    flops = _flops(step, model, fixed)
    summary: dict[str, Any] = {"step_ratio": {}}
    for name in ("fixed", "rotten_tomatoes"):
        of = [row for row in rows if row["workload"] == name]
        seconds = {arm: [row["seconds"] for row in of if row["arm"] == arm] for arm in ("jtl", "peft")}
        summary["step_ratio"][name] = estimate(
            [b / a for a, b in zip(seconds["jtl"], seconds["peft"], strict=True)]
        )
        summary[f"examples_per_second_{name}"] = summarise(of, ["examples_per_second"])["examples_per_second"]
    exact = lambda value: {"mean": value, "ci95": None, "n": 1}  # noqa: E731
    summary["peak_memory"] = {arm: exact(size) for arm, size in memory.items()}
    summary["memory_ratio"] = {"peft": exact(memory["peft"] / memory["jtl"])}
    summary["flops_over_minimum"] = {name: exact(flops[name] / flops["minimum"]) for name in ("lora", "full")}
    versions = {
        **environment(),
        **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
        "compile_seconds": compiled,
    }
    result = Result("bench_lora", settings(config), versions, time.monotonic() - began, rows, summary)
    write_result(out, result)
    lines = [[name, f"{value / 1e9:.2f}", f"{value / flops['minimum']:.3f}"] for name, value in flops.items()]
    write_report(
        out,
        result,
        title="LoRA in jtl beside PEFT",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("benchmarks.lora", config),
        sections=[Section("Operations of a fixed step", table(["step", "GFLOP", "over the minimum"], lines))],
    )
    return result


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
        base = transformers.AutoModelForSequenceClassification.from_pretrained(Path(folder) / "base")
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


def _jax_round(step: Step, state: Any, batches: Sequence[Any]) -> tuple[Any, float]:
    started = time.monotonic()
    for batch in batches:
        state, _ = step(state, batch)
    jax.block_until_ready(state.trained)
    return state, time.monotonic() - started


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


def _jax_memory(step: Step, model: Model, batch: Any) -> float:
    """Bytes that a step holds at its peak: arguments, results that reuse none of them, and temporaries."""
    size = step.lower(model, batch).compile().memory_analysis()
    return float(
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
    )


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
        return step.lower(model, batch).compile().cost_analysis()["flops"]

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
