"""Distillation of a language model: a student of fewer layers, and how it learns from its teacher token by token.

The student begins as the first and last layers of SmolLM2-135M with its embeddings, and trains for few updates on texts
of a domain. ``student_alone`` predicts their next tokens; the other arms also learn from the teacher.

    python -m experiments.distill_lm --out runs/distill_lm

Papers: ``forward_kl``, ``top_k`` (with the teacher's most likely tokens alone) and ``sequence_level``,
https://arxiv.org/abs/1606.07947; ``reverse_kl``, https://arxiv.org/abs/2306.08543; ``jsd`` and ``gkd``,
https://arxiv.org/abs/2306.13649.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import jax
import numpy as np

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare
from experiments.common.recipe import Recipe, train
from jtl import data, distill, measure, pretrained
from jtl.data import text
from jtl.data.batches.loader import Batches
from jtl.errors import InputError
from jtl.model import Model
from jtl.outputs import mean_loss
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table
from jtl.tasks import CausalLM, generate
from jtl.train import Step, TrainState

ABOUT = (
    "The student begins as some layers of the teacher with its embeddings, and trains for few updates on texts of a "
    "domain. `student_alone` predicts their next tokens. The other arms add a divergence from the teacher's "
    "next-token distribution to that loss, one to one: `forward_kl` (word-level distillation), `top_k` (the same with "
    "the teacher's most likely tokens alone, computed once and stored), `reverse_kl` (as in MiniLLM), `jsd` and "
    "`gkd`, whose batches are the student's own continuations with probability λ. `sequence_level` trains on "
    "continuations that the teacher wrote. `untrained` is the student as it begins. `perplexity` is that of held-out "
    "texts of the domain."
)
Arm = Literal["student_alone", "forward_kl", "top_k", "reverse_kl", "jsd", "gkd", "sequence_level"]
ARMS: tuple[str, ...] = get_args(Arm)


@dataclass(frozen=True, kw_only=True)
class DistillLM(Config):
    """Settings of the comparison."""

    model: str = "smollm2"
    """The teacher: a causal language model."""
    data: str = "rotten_tomatoes"
    """Texts of the domain; see experiments.finetune."""
    layers: tuple[int, ...] = (0, 1, 2, 27, 28, 29)
    """Layers of the teacher that the student begins as, from 0; the first and last begin better than every fifth."""
    arm: tuple[Arm | Literal["all"], ...] = ("all",)
    """Which to compare; student_alone always runs."""
    steps: int = at_least(1, 80)
    """Updates of every student."""
    batch_size: int = at_least(1, 4)
    """Texts of an update."""
    rate: float = above(0, 5e-4)
    """Peak learning rate of AdamW."""
    max_length: int = 32
    """Tokens of a text; longer ones are cut, and shorter ones left out."""
    prompt: int = at_least(1, 8)
    """Tokens of a text that are continued."""
    on_policy: float = at_least(0, 0.5)
    """λ of gkd: share of updates on the student's own continuations."""
    top_k: int = at_least(1, 32)
    """Tokens of the teacher's distribution that are stored at each position."""
    test_examples: int = at_least(1, 100)
    """Held-out texts."""
    seeds: int = at_least(1, 3)
    """Repetitions: other texts in another order."""


def run(config: DistillLM) -> Result:
    """Train a student under each arm; writes into ``config.out`` and returns the result."""
    if config.prompt >= config.max_length:
        raise InputError(f"--prompt {config.prompt} must be below --max-length {config.max_length}")
    rows = ResumableRows(prepare(config, "distill_lm"), resume=config.resume)
    sizes = shortened(config) if config.quick else config
    trainer = Trainer(sizes)
    chosen = ARMS if "all" in sizes.arm else dict.fromkeys(("student_alone", *sizes.arm))
    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ("teacher", "untrained", *chosen):
            row = rows.get(partial(trainer, arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  perplexity {row['perplexity']:.1f}  {row['seconds']:.0f} s")
    cost = rows.get(trainer.cost, arm="cost", seed=sizes.seed)
    trained = [row for row in rows.rows if row["arm"] != "cost"]
    found = summarise(trained, ["perplexity", "loss", "seconds"])
    ratios = summarise([{**cost, "arm": "student"}], ["latency_ratio", "parameter_ratio"])
    return finish(
        "distill_lm",
        config,
        rows,
        _sections(trained, rows.curves, cost),
        title="Distillation of a language model",
        about=ABOUT,
        summary={"perplexity_lm": found.pop("perplexity"), **found, **ratios},
    )


def shortened(config: DistillLM) -> DistillLM:
    """The settings of ``--quick``."""
    arm: tuple[Arm | Literal["all"], ...] = ("top_k",) if "all" in config.arm else config.arm
    return replace(config, arm=arm, steps=6, batch_size=4, max_length=16, prompt=4, test_examples=16, seeds=1)


class Trainer:
    """A teacher, the texts of a domain, and students that learn from both."""

    def __init__(self, config: DistillLM) -> None:
        self.config = config
        self.teacher = pretrained.load(config.model)
        self.tokenizer = pretrained.tokenizer(config.model)
        dataset = data.load(config.data)
        if dataset.kind != "text":
            raise InputError(f"--data {config.data} holds {dataset.kind}s: choose a text data set")
        self.splits = {name: self._long_enough(dataset.splits[name]) for name in ("train", "test")}
        self.student = distill.choose_layers(self.teacher, config.layers, stack="decoder/layer_")

    def _long_enough(self, split: Any) -> text.Texts:
        """Its texts of ``max_length`` tokens or more, cut to that, so that all batches have one shape."""
        limit = self.config.max_length
        encoded = text.encode(split, self.tokenizer, limit)
        return encoded.take(np.flatnonzero(encoded.lengths == limit))

    def train_texts(self, seed: int) -> text.Texts:
        """The texts of one seed, each used once."""
        count = self.config.steps * self.config.batch_size
        have = len(self.splits["train"])
        if have < count:
            raise InputError(
                f"--data {self.config.data} has {have} texts of {self.config.max_length} tokens; {count} are needed: "
                "take fewer --steps, a smaller --batch-size or a lower --max-length"
            )
        return self.splits["train"].take(np.random.default_rng(seed).permutation(have)[:count])

    @cached_property
    def held_out(self) -> list[Any]:
        """Batches of held-out texts."""
        texts = self.splits["test"]
        return list(
            Batches(texts.take(np.arange(min(self.config.test_examples, len(texts)))), 8, train=False)
        )

    def __call__(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm, and its learning curve."""
        began = time.monotonic()
        curve: list[dict[str, Any]] = []
        model = self.teacher if arm == "teacher" else self.student
        if arm not in ("teacher", "untrained"):
            model, curve = self.distilled(arm, seed)
        loss = next_token_loss(model, self.held_out)
        return {"loss": loss, "perplexity": math.exp(loss), "seconds": time.monotonic() - began}, curve

    def distilled(self, arm: str, seed: int) -> tuple[Model, list[dict[str, Any]]]:
        """The student after training under an arm, and its learning curve."""
        config, texts = self.config, self.train_texts(seed)
        batches: Any = Batches(texts, config.batch_size, seed=seed)
        if arm == "top_k":
            batches = Batches(distill.Taught(texts, self.stored(texts)), config.batch_size, seed=seed)
        if arm == "sequence_level":
            batches = [self.written(batch) for batch in batches]
        on_policy = partial(OnPolicy, config=config, eos_id=self.tokenizer.eos_token_id, seed=seed)
        fitted = train(
            Recipe(jax.tree.map(jax.numpy.array, self.student), self.loss(arm), batches),
            steps=config.steps,
            rate=config.rate,
            seed=seed,
            around=on_policy if arm == "gkd" else lambda step: step,
            validate=lambda model: {"loss": next_token_loss(model, self.held_out[:4])},
            validate_every=-(-config.steps // (1 if config.quick else 4)),
            metric="loss",
            mode="min",
        )
        return fitted.state.model, fitted.history

    def loss(self, arm: Any) -> Any:
        """What an arm minimises."""
        if arm in ("student_alone", "sequence_level"):
            return CausalLM()
        if arm == "top_k":
            return CausalLM() + distill.TopKSequenceKD()
        if arm == "gkd":
            return distill.Distill(self.teacher, distill.SequenceKD("jsd", mask="continuation"))
        return distill.Distill(self.teacher, CausalLM() + distill.SequenceKD(arm))

    def stored(self, texts: text.Texts) -> dict[str, np.ndarray]:
        """The teacher's most likely tokens at each position of the training texts."""
        parts = []
        for batch in Batches(texts, self.config.batch_size, train=False):
            kept, places = _most_likely(self.teacher, batch, self.config.top_k)
            parts.append([np.asarray(own)[batch["index"] >= 0] for own in (batch["index"], kept, places)])
        index, kept, places = map(np.concatenate, zip(*parts, strict=True))
        rows = np.argsort(index)
        return {"teacher_top_log_probabilities": kept[rows], "teacher_top_places": places[rows]}

    def written(self, batch: Any) -> dict[str, np.ndarray]:
        """``batch`` as the teacher continues its prompts."""
        found = distill.sample_continuations(
            self.teacher,
            batch,
            prompt=self.config.prompt,
            temperature=0.0,
            eos_id=self.tokenizer.eos_token_id,
        )
        return jax.tree.map(np.asarray, found)

    def cost(self) -> tuple[dict[str, Any], list[Any]]:
        """What teacher and student cost, and their ratios."""
        batch = self.held_out[0]
        found = {
            name: measure.forward(model, batch, output="token_logits", runs=3 if self.config.quick else 10)
            for name, model in (("teacher", self.teacher), ("student", self.student))
        }
        row = {
            f"{name}_{field}": value
            for name, size in found.items()
            for field, value in size._asdict().items()
        }
        ratios = {
            "latency_ratio": row["teacher_seconds"] / row["student_seconds"],
            "parameter_ratio": row["teacher_parameters"] / row["student_parameters"],
        }
        prompt = {name: batch[name][:, : self.config.prompt] for name in ("input_ids", "attention_mask")}
        new = generate(self.teacher, **prompt, max_new_tokens=16)
        samples = self.tokenizer.batch_decode(np.concatenate([prompt["input_ids"], new], 1)[:3])
        return {**row, **ratios, "teacher_writes": samples}, []


@dataclass(frozen=True)
class OnPolicy:
    """A train step that first lets the student continue the batch's prompts, with probability λ."""

    step: Step
    config: DistillLM
    eos_id: int | None
    seed: int

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """One update."""
        number = int(state.step)
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        if np.random.default_rng((self.seed, number)).random() < self.config.on_policy:
            batch = distill.sample_continuations(
                state.model, batch, prompt=self.config.prompt, key=key, eos_id=self.eos_id
            )
        else:
            batch = distill.mask_continuations(batch, prompt=self.config.prompt)
        fields = ("input_ids", "attention_mask", "continuation", "weight")
        return self.step(state, {name: batch[name] for name in fields})


@partial(jax.jit, static_argnums=2)
def _most_likely(teacher: Model, batch: Any, k: int) -> Any:
    return distill.top_k(teacher(batch)["token_logits"], k)


def next_token_loss(model: Model, batches: list[Any]) -> float:
    """Mean loss of a next token, in nats."""
    return mean_loss(CausalLM(), model, batches, weight="tokens")[0]


def _sections(
    rows: list[dict[str, Any]], curves: list[dict[str, Any]], cost: dict[str, Any]
) -> list[Section]:
    found = summarise(rows, ["perplexity", "loss", "seconds"])
    order = sorted(found["loss"], key=lambda arm: found["loss"][arm]["mean"])
    lines = []
    for arm in order:
        fixed = arm in ("teacher", "untrained", "student_alone")
        less = "" if fixed else format_estimate(paired_difference(rows, "loss", arm, "student_alone"))
        lines.append(
            [arm, format_estimate(found["perplexity"][arm]), format_estimate(found["loss"][arm]), less,
             f"{found['seconds'][arm]['mean']:.0f}"]
        )  # fmt: skip
    head = ["arm", "perplexity", "loss (nats)", "loss less student_alone", "seconds"]
    sizes = [
        [who, f"{cost[f'{who}_parameters']:,.0f}", f"{cost[f'{who}_flops'] / 1e9:.3g}",
         f"{1e3 * cost[f'{who}_seconds']:.0f}"]
        for who in ("teacher", "student")
    ]  # fmt: skip
    return [
        Section("Held-out texts", table(head, lines)),
        Section(
            "Size",
            f"One forward of a batch; the student is {cost['latency_ratio']:.2f} times as fast.\n\n"
            + table(["", "parameters", "GFLOP", "ms"], sizes),
        ),
        Section(
            "Learning curves",
            "Training loss (of its own kind in each arm), and the loss of 32 held-out texts.",
            figures.learning_curves(curves, "validation_loss"),
        ),
        Section("What the teacher writes", "\n".join(f"* {line}" for line in cost["teacher_writes"])),
    ]


if __name__ == "__main__":
    main(run, DistillLM)
