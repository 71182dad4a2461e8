"""Continued pretraining on domain text, before fine-tuning: what it gains, and what it makes a model forget.

Gururangan et al. 2020, "Don't Stop Pretraining: Adapt Language Models to Domains and Tasks",
https://arxiv.org/abs/2004.10964: masked language modelling (Devlin et al. 2019, 1810.04805) goes on, on the unlabelled
texts of a task's training split (their TAPT), then the model is fine-tuned on few labelled ones. The arms differ in
what they go on with, all for as many updates:

* ``none``: nothing; the model is fine-tuned at once.
* ``domain``: the texts of the training split, with the plots of its films if the data are Rotten Tomatoes.
* ``other``: texts of another domain, the paper's control: is it the domain, or only the training?
* ``replay``: texts of the domain and of the other in each batch, against forgetting.

    python -m experiments.domain_pretraining --out runs/domain_pretraining

The encoder comes without a head for masked words, so a new one is trained first on the frozen body, on equal parts of
both domains; it is the same for all arms of a seed, and ``none`` is measured with it. ``mlm_loss_domain`` and
``mlm_loss_other`` are losses on held-out texts (nats a hidden word; the same words are hidden from every arm), so
``mlm_loss_other`` above that of ``none`` is forgetting. ``accuracy`` is that of the fine-tuned model on test.

Expected (``experiments/results/domain_pretraining.json``, three seeds, about 25 minutes of one core): ``accuracy``
0.709 ± 0.061 (``none``), 0.700 ± 0.061 (``domain``), 0.707 ± 0.070 (``other``), 0.700 ± 0.085 (``replay``): no gain is
shown. ``mlm_loss_domain`` 7.244 ± 0.033 and 5.786 ± 0.082 (``none``, ``domain``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification, prepare_classification
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import data, finetune, heads, pretrained
from jtl.data import text
from jtl.data.batches.loader import Batches, loader
from jtl.data.batches.mixing import SideBySide
from jtl.errors import InputError
from jtl.model import Model, remove
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
from jtl.tasks import MaskedLM, masked_head
from jtl.train import adamw, fit, make_step, schedule

ARMS = ("none", "domain", "other", "replay")
METRICS = ("accuracy", "mlm_loss_domain", "mlm_loss_other")
VALIDATION = 128  # held-out texts of each domain along the way
SHAPES = 2  # padded lengths: each compiles four programs


@dataclass(frozen=True, kw_only=True)
class DomainPretraining(Config):
    """Settings of the comparison."""

    model: str = "minilm"
    """A text encoder whose tokenizer has a mask token, as for experiments.finetune."""
    data: str = "rotten_tomatoes"
    """The task, whose training texts are the domain."""
    other_data: str = "newsgroups20"
    """The other domain: of the control, of replay and of forgetting."""
    max_length: int = 48
    """Longest text in tokens; the rest is cut off."""
    head_steps: int = 150
    """Updates of the new masked head on the frozen body."""
    head_rate: float = 1e-3
    """Their peak learning rate."""
    steps: int = 150
    """Updates of continued pretraining."""
    rate: float = 1e-4
    """Their peak learning rate."""
    batch_size: int = 32
    """Texts an update of pretraining."""
    replay: float = 0.5
    """Share of each batch of `replay` that is of the other domain."""
    train_examples: int = 256
    """Labelled examples to fine-tune on."""
    finetune_steps: int = 60
    """Updates of fine-tuning, 16 examples each."""
    test_examples: int = 1000
    """Labelled test examples; a half as many texts of each domain are held out for the masked losses."""
    seeds: int = 3
    """Repetitions: other masks, heads, orders and labelled examples."""


@dataclass(frozen=True)
class Corpora:
    """Unlabelled texts, encoded.

    Attributes:
        train: what there is to pretrain on, ``domain`` and ``other``.
        held_out: for the losses of the report, likewise.
        validation: for the learning curves, likewise.
        buckets: the padded lengths of them all.
    """

    train: dict[str, text.Texts]
    held_out: dict[str, text.Texts]
    validation: dict[str, text.Texts]
    buckets: tuple[int, ...]


def run(config: DomainPretraining) -> Result:
    """Pretrain on, fine-tune and compare; writes into ``config.out`` and returns the result."""
    if not 0 < round(config.replay * config.batch_size) < config.batch_size:
        raise InputError(
            f"--replay {config.replay} of {config.batch_size} texts leaves a batch without one of the domains: "
            "choose a share between 0 and 1, or a larger --batch-size"
        )
    out = prepare(config, "domain_pretraining")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    task = prepare_classification(
        sizes.model,
        sizes.data,
        max_length=sizes.max_length,
        validation=60 if sizes.quick else 250,
        test=sizes.test_examples,
        quick=sizes.quick,
    )
    tokenizer = pretrained.tokenizer(sizes.model)
    corpora = read(sizes, task, tokenizer)
    task = replace(task, buckets=corpora.buckets)

    @lru_cache(1)
    def start(seed: int) -> Model:
        """The pretrained body under a masked head that it had no part in training."""
        model = masked_head(task.pretrained, tokenizer, key=jax.random.fold_in(jax.random.key(seed), 0))
        return pretrain(sizes, model, corpora, 0.5, seed, head=True)[0]

    for seed in range(sizes.seed, sizes.seed + sizes.seeds):
        for arm in ARMS:

            def measured(arm: str = arm, seed: int = seed) -> Any:
                model = start(seed)
                curve: list[dict[str, Any]] = []
                began = time.monotonic()
                if arm != "none":
                    share = {"domain": 0.0, "other": 1.0, "replay": sizes.replay}[arm]
                    model, curve = pretrain(sizes, model, corpora, share, seed)
                took = time.monotonic() - began
                return {
                    "accuracy": tuned(sizes, task, model, seed),
                    **{
                        f"mlm_loss_{n}": masked_loss(model, corpora, own)
                        for n, own in corpora.held_out.items()
                    },
                    "pretraining_seconds": took,
                }, curve

            row = ledger.get(measured, arm=arm, seed=seed)
            print(f"seed {seed}, {arm}: " + ", ".join(f"{name} {row[name]:.3f}" for name in METRICS))

    result = Result(
        "domain_pretraining",
        settings(config),
        environment(),
        ledger.seconds,
        ledger.rows,
        summarise(ledger.rows, [*METRICS, "pretraining_seconds"]),
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title=f"Continued pretraining of {config.model} for {config.data}",
        about=_about(sizes, corpora),
        command=command("domain_pretraining", config),
        sections=_sections(ledger),
        notes=[
            f"{sizes.steps} updates are a short pretraining: the paper's, of RoBERTa, take 12,500 on a domain and 100 "
            "epochs of a task's texts.",
            f"`{config.model}` may be no plain language model: all-MiniLM-L6-v2 was made for sentence similarity. "
            "Its masked head is new, and goes on learning in every arm but `none`.",
        ],
    )
    return result


def shortened(config: DomainPretraining) -> DomainPretraining:
    """The settings of ``--quick``."""
    return replace(
        config,
        max_length=32,
        head_steps=8,
        steps=8,
        batch_size=16,
        train_examples=64,
        finetune_steps=8,
        test_examples=100,
        seeds=1,
    )


def read(config: DomainPretraining, task: Classification, tokenizer: Any) -> Corpora:
    """The texts of both domains; none that is held out is trained on."""
    other = data.load(config.other_data)
    if other.kind != "text":
        raise InputError(f"--other-data {config.other_data} holds {other.kind}s: choose a text data set")
    domain = task.dataset.splits["train"]
    train = [domain[i]["text"] for i in range(len(domain))]
    if config.data == "rotten_tomatoes":
        from jtl.data.sets.builders import rotten_tomatoes_rows

        films = {domain[i]["film"] for i in range(len(domain))}
        train += [plot for kind, film, plot in rotten_tomatoes_rows() if kind == "plot" and film in films]
    few, some = config.test_examples // 2, 16 if config.quick else VALIDATION

    def encoded(source: Any, most: int | None = None) -> text.Texts:
        most = len(source) if most is None else min(most, len(source))
        chosen = np.random.default_rng(0).permutation(len(source))[:most]
        rows = [{"text": source[int(i)]["text"], "label": 0} for i in chosen]
        return text.encode(rows, tokenizer, config.max_length)

    corpora = {
        "train": {
            "domain": encoded([{"text": line} for line in train]),
            "other": encoded(other.splits["train"], len(train)),
        },
        "held_out": {
            "domain": encoded(task.dataset.splits["test"], few),
            "other": encoded(other.splits["test"], few),
        },
        "validation": {
            "domain": encoded(task.dataset.splits["validation"], some),
            "other": encoded(other.splits["validation"], some),
        },
    }
    lengths = np.concatenate([texts.lengths for part in corpora.values() for texts in part.values()])
    return Corpora(
        **corpora, buckets=text.best_buckets(lengths, 1 if config.quick else SHAPES, config.max_length)
    )


def order(config: DomainPretraining, corpora: Corpora, share: float, steps: int, seed: int) -> SideBySide:
    """Batches for at least ``steps`` updates, ``share`` of the rows of each of the other domain."""
    other = round(share * config.batch_size)
    sizes = {"domain": config.batch_size - other, "other": other}
    parts = []
    for name, size in sizes.items():
        if size:
            per_epoch = max(1, len(corpora.train[name]) // size)
            epochs = -(-steps // per_epoch)
            part = Batches(corpora.train[name], size, seed=seed, epochs=epochs, buckets=corpora.buckets)
            parts.append(part)
    return SideBySide(tuple(parts))


def pretrain(
    config: DomainPretraining,
    model: Model,
    corpora: Corpora,
    share: float,
    seed: int,
    *,
    head: bool = False,
) -> tuple[Model, list[dict[str, Any]]]:
    """The model after masked language modelling of the whole or of the ``head`` alone, and its curve."""
    steps, rate = (config.head_steps, config.head_rate) if head else (config.steps, config.rate)
    labels = finetune.train_only(model, "mlm/.*") if head else None
    step = make_step(MaskedLM(), adamw(schedule(rate, steps)), labels)

    def validate(model: Model) -> dict[str, float]:
        return {
            f"mlm_loss_{name}": masked_loss(model, corpora, own) for name, own in corpora.validation.items()
        }

    fitted = fit(
        step,
        step.init(model, jax.random.fold_in(jax.random.key(seed), 1)),
        loader(order(config, corpora, share, steps, seed)),
        steps=steps,
        validate=validate,
        validate_every=-(-steps // (1 if config.quick else 4)),
        metric="mlm_loss_domain",
        mode="min",
    )
    # The first loss is that of the model before any update, and so belongs to its validation.
    before = {f"validation_{name}": loss for name, loss in validate(model).items()}
    curve = [{"step": 0, "loss": fitted.history[0]["loss"], **before}, *fitted.history]
    return fitted.state.model, curve  # the last model, not that which validated best: equal updates


@jax.jit
def _masked_loss(model: Model, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, metrics = MaskedLM().value(model, model(batch, key=key), batch, None)
    return value, metrics["tokens"]


def masked_loss(model: Model, corpora: Corpora, texts: text.Texts) -> float:
    """Mean loss of the hidden words of some texts, in nats; the words are the same at each call."""
    batches: Iterable[Any] = Batches(texts, 32, train=False, buckets=corpora.buckets)
    found = np.array(
        [_masked_loss(model, batch, jax.random.key(i)) for i, batch in enumerate(batches)], np.float64
    )
    return float(np.average(found[:, 0], weights=found[:, 1]))


def tuned(config: DomainPretraining, task: Classification, model: Model, seed: int) -> float:
    """Test accuracy after fine-tuning on a few labelled examples, from a new classifier on the mean of the words."""
    few = task.with_train(config.train_examples, seed)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    begin = heads.classifier(remove(model, "mlm"), task.classes, key=key, on="features")
    steps = config.finetune_steps
    budget = techniques.Budget(
        epochs=1, min_steps=steps, max_steps=steps, batch_size=16, validations=1 if config.quick else 3
    )
    return techniques.run_arm(few, "full", seed=seed, budget=budget, model=begin).row["accuracy"]


def _about(config: DomainPretraining, corpora: Corpora) -> str:
    sizes = {name: len(texts) for name, texts in corpora.train.items()}
    return (
        f"`domain` draws on {sizes['domain']:,} unlabelled texts of `{config.data}`, `other` on {sizes['other']:,} of "
        f"`{config.other_data}`, `replay` on both, {config.replay:.0%} other. Each arm but `none` goes on with masked "
        f"language modelling for {config.steps} updates of {config.batch_size} texts; then all are fine-tuned on "
        f"{config.train_examples} labelled examples. Masked losses are on {len(corpora.held_out['domain']):,} and "
        f"{len(corpora.held_out['other']):,} held-out texts, before fine-tuning."
    )


def _sections(ledger: ResumableRows) -> list[Section]:
    lines = [
        [arm, *(format_estimate(paired_difference(ledger.rows, metric, arm, "none")) for metric in METRICS)]
        for arm in ARMS[1:]
    ]
    curves = {
        name: figures.learning_curves(ledger.curves, f"validation_mlm_loss_{name}")
        for name in ("domain", "other")
    }
    return [
        Section(
            "Less none",
            "Paired differences over seeds. Below 0 is better for a loss; `mlm_loss_other` above 0 is forgetting.\n\n"
            + table(["arm", *METRICS], lines),
        ),
        Section(
            "Learning the domain",
            "Masked loss on validation texts of the domain; at step 0 that of `none`.",
            curves["domain"],
        ),
        Section(
            "Forgetting",
            "Masked loss on validation texts of the other domain; at step 0 that of `none`.",
            curves["other"],
        ),
    ]


if __name__ == "__main__":
    main(run, DomainPretraining)
