"""Greedy generation beside ``transformers`` (torch): the same SmolLM2, prompts and tokens, both with a cache.

``token_ratio`` is transformers / jtl in seconds for each token of a text: above 1, jtl is faster.

    python -m experiments.benchmarks.generate --out runs/bench_generate

Needs the extra ``parity``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import ratio
from experiments.common import Config, at_least, finish, main, prepare
from jtl import data, pretrained, tasks
from jtl.errors import InputError
from jtl.model import Model
from jtl.report import Result, estimate, summarise

ABOUT = """A language model (SmolLM2-135M-Instruct by default), made float32 by jtl and saved for torch, continues
prompts of film reviews, one text alone (one_text) and several at once (batch). Rounds alternate between the two;
compilation and the first call are done before. token_ratio is transformers / jtl in seconds for each token of a text:
above 1, jtl is faster. The prompt's own time is in it, a few tokens' worth. same_tokens is the share of texts that both
continue alike: float32 sums of another order may turn a near tie, and what follows is then another text."""


@dataclass(frozen=True, kw_only=True)
class BenchGenerate(Config):
    """Settings of the benchmark."""

    model: str = "smollm2"
    """A language model: a short name, folder or hub id."""
    prompt_tokens: int = at_least(1, 32)
    """Tokens of a prompt."""
    new_tokens: int = at_least(1, 64)
    """Tokens that follow."""
    batch_size: int = at_least(1, 8)
    """Texts of a call of ``batch``."""
    rounds: int = at_least(1, 5)
    """Calls of each workload."""
    threads: int = at_least(1, 2)
    """CPU threads of torch; XLA takes as many processors as there are."""


def run(config: BenchGenerate) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import torch
    import transformers

    began = time.monotonic()
    prepare(config, "bench_generate")
    torch.set_num_threads(config.threads)
    rounds, length = (2, 16) if config.quick else (config.rounds, config.new_tokens)
    model = pretrained.load(config.model)
    theirs = _peer(model)
    prompts = _prompts(config, (rounds + 1) * config.batch_size)
    work = {"one_text": 1, "batch": config.batch_size}

    started = time.monotonic()
    for size in work.values():
        _jtl(model, prompts[:size], length)
    compiled = time.monotonic() - started
    for size in work.values():
        _torch(theirs, prompts[:size], length)

    rows: list[dict[str, Any]] = []
    for i in range(rounds):
        texts = prompts[(i + 1) * config.batch_size :]
        for name, size in work.items():
            tokens, seconds = {}, {}
            for arm, call, network in (("jtl", _jtl, model), ("transformers", _torch, theirs)):
                started = time.monotonic()
                tokens[arm] = call(network, texts[:size], length)
                seconds[arm] = (time.monotonic() - started) / length
                rows.append(
                    {"arm": arm, "seed": i, "workload": name, "seconds_per_token": seconds[arm],
                     "tokens_per_second": size / seconds[arm]}
                )  # fmt: skip
            rows[-1]["same_tokens"] = rows[-2]["same_tokens"] = float(
                (tokens["jtl"] == tokens["transformers"]).all(1).mean()
            )
            print(f"round {i + 1}  {name}: transformers / jtl {seconds['transformers'] / seconds['jtl']:.2f}")

    summary: dict[str, Any] = {"token_ratio": {}, "same_tokens": {}}
    for name in work:
        of = [row for row in rows if row["workload"] == name]
        summary["token_ratio"][name] = ratio(of, "seconds_per_token", "transformers")
        summary["same_tokens"][name] = estimate([row["same_tokens"] for row in of if row["arm"] == "jtl"])
        for metric in ("tokens_per_second", "seconds_per_token"):
            summary[f"{metric}_{name}"] = summarise(of, [metric])[metric]
    versions = {
        **{package.__name__: package.__version__ for package in (torch, transformers)},
        "compile_seconds": compiled,
    }
    return finish(
        "bench_generate", config, rows, (), title="Greedy generation in jtl beside transformers", about=ABOUT,
        summary=summary, seconds=time.monotonic() - began, versions=versions,
    )  # fmt: skip


def _prompts(config: BenchGenerate, count: int) -> np.ndarray:
    """The first tokens of that many reviews that are long enough."""
    words, found = pretrained.tokenizer(config.model), []
    train = data.load("rotten_tomatoes").splits["train"]
    for row in np.random.default_rng(config.seed).permutation(len(train)):
        ids = words(train[row]["text"])["input_ids"]
        if len(ids) >= config.prompt_tokens:
            found.append(ids[: config.prompt_tokens])
        if len(found) == count:
            return np.array(found, np.int32)
    raise InputError(
        f"--prompt-tokens {config.prompt_tokens}: {len(found)} reviews are as long, {count} are needed"
    )


def _peer(model: Model) -> Any:
    """The same weights in transformers, opened from our own files."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(model, Path(folder) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", trust_remote_code=False
        ).eval()


def _jtl(model: Model, prompts: np.ndarray, length: int) -> np.ndarray:
    return np.asarray(jax.block_until_ready(tasks.generate(model, prompts, max_new_tokens=length)))


def _torch(model: Any, prompts: np.ndarray, length: int) -> np.ndarray:
    import torch

    ids = torch.from_numpy(prompts).long()
    with torch.inference_mode():
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,  # or it would stop at the end of a text
            pad_token_id=0,
        )
    return new[:, prompts.shape[1] :].numpy()


if __name__ == "__main__":
    main(run, BenchGenerate)
