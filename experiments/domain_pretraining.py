"""Continued pretraining on unlabelled text of a domain, before fine-tuning: what it gains, and what the model forgets.

Masked language modelling goes on, on the unlabelled texts of a task's training split; then the model is fine-tuned on
few labelled ones. The arms differ in the texts of continued pretraining, all with as many updates:

* ``none``: no continued pretraining.
* ``domain``: the texts of the training split, with the plots of its films if the data are Rotten Tomatoes.
* ``other``: texts of another domain, as a control.
* ``replay``: texts of the domain and of the other in each batch, against forgetting.

    python -m experiments.domain_pretraining --out runs/domain_pretraining

Papers: task-adaptive pretraining, https://arxiv.org/abs/2004.10964; masked language modelling,
https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count, product
from typing import Any

import jax
import numpy as np

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, prepare_classification
from experiments.common.recipe import Recipe, train
from jtl import data, finetune, heads, pretrained
from jtl.data import text
from jtl.data.batches.loader import Batches
from jtl.data.batches.mixing import SideBySide
from jtl.errors import InputError
from jtl.model import Model, remove
from jtl.outputs import mean_loss
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table
from jtl.tasks import MaskedLM, masked_head

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
    max_length: int = at_least(1, 48)
    """Longest text in tokens; the rest is cut off."""
    head_steps: int = at_least(1, 150)
    """Updates of the new masked head on the frozen body."""
    head_rate: float = above(0, 1e-3)
    """Their peak learning rate."""
    steps: int = at_least(1, 150)
    """Updates of continued pretraining."""
    rate: float = above(0, 1e-4)
    """Their peak learning rate."""
    batch_size: int = at_least(2, 32)
    """Texts an update of pretraining."""
    replay: float = 0.5
    """Share of each batch of `replay` that is of the other domain."""
    train_examples: int = at_least(1, 256)
    """Labelled examples to fine-tune on."""
    finetune_steps: int = at_least(1, 60)
    """Updates of fine-tuning, 16 examples each."""
    test_examples: int = at_least(2, 1000)
    """Labelled test examples; a half as many texts of each domain are held out for the masked losses."""
    seeds: int = at_least(1, 3)
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
    rows = ResumableRows(prepare(config, "domain_pretraining"), resume=config.resume)
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
        """The pretrained body under a new masked head, which alone was trained."""
        model = masked_head(task.pretrained, tokenizer, key=jax.random.fold_in(jax.random.key(seed), 0))
        return pretrain(sizes, model, corpora, 0.5, seed, head=True)[0]

    def measured(arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        model = start(seed)
        curve: list[dict[str, Any]] = []
        began = time.monotonic()
        if arm != "none":
            share = {"domain": 0.0, "other": 1.0, "replay": sizes.replay}[arm]
            model, curve = pretrain(sizes, model, corpora, share, seed)
        took = time.monotonic() - began
        accuracy = tuned(sizes, task, model, seed)
        losses = masked_losses(model, corpora.held_out, corpora.buckets)
        return {"accuracy": accuracy, **losses, "pretraining_seconds": took}, curve

    for seed, arm in product(range(sizes.seed, sizes.seed + sizes.seeds), ARMS):
        row = rows.get(partial(measured, arm, seed), arm=arm, seed=seed)
        print(f"seed {seed}, {arm}: " + ", ".join(f"{name} {row[name]:.3f}" for name in METRICS))

    return finish(
        "domain_pretraining",
        config,
        rows,
        _sections(rows),
        title=f"Continued pretraining of {config.model} for {config.data}",
        about=_about(sizes, corpora),
        summary=summarise(rows.rows, [*METRICS, "pretraining_seconds"]),
        notes=[
            f"{sizes.steps} updates are a short pretraining: the paper's, of RoBERTa, take 12,500 on a domain and 100 "
            "epochs of a task's texts.",
            f"`{config.model}` may be no plain language model: all-MiniLM-L6-v2 was made for sentence similarity. "
            "Its masked head is new, and goes on learning in every arm but `none`.",
        ],
    )


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
    own = [domain[i]["text"] for i in range(len(domain))]
    if config.data == "rotten_tomatoes":
        from jtl.data.sets.builders import rotten_tomatoes_rows

        films = {domain[i]["film"] for i in range(len(domain))}
        own += [plot for kind, film, plot in rotten_tomatoes_rows() if kind == "plot" and film in films]
    few, some = config.test_examples // 2, 16 if config.quick else VALIDATION

    def encoded(source: Any, most: int | None = None) -> text.Texts:
        most = len(source) if most is None else min(most, len(source))
        chosen = np.random.default_rng(0).permutation(len(source))[:most]
        rows = [{"text": source[int(i)]["text"], "label": 0} for i in chosen]
        return text.encode(rows, tokenizer, config.max_length)

    corpora = {
        "train": {
            "domain": encoded([{"text": line} for line in own]),
            "other": encoded(other.splits["train"], len(own)),
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
    """Batches for ``steps`` updates, ``share`` of the rows of each of the other domain."""
    other = round(share * config.batch_size)
    sizes = {"domain": config.batch_size - other, "other": other}
    return SideBySide(
        tuple(
            Batches(corpora.train[name], size, seed=seed, steps=steps, buckets=corpora.buckets)
            for name, size in sizes.items()
            if size
        )
    )


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
    validate = partial(masked_losses, texts=corpora.validation, buckets=corpora.buckets)
    fitted = train(
        Recipe(model, MaskedLM(), order(config, corpora, share, steps, seed), labels),
        steps=steps,
        rate=rate,
        seed=jax.random.fold_in(jax.random.key(seed), 1),
        validate=validate,
        validate_every=-(-steps // (1 if config.quick else 4)),
        metric="mlm_loss_domain",
        mode="min",
    )
    # The first loss is that of the model before any update, and so belongs to its validation.
    before = {f"validation_{name}": loss for name, loss in validate(model).items()}
    curve: list[dict[str, Any]] = [{"step": 0, "loss": fitted.history[0]["loss"], **before}, *fitted.history]
    return fitted.state.model, curve  # the last model, not that which validated best: equal updates


def masked_losses(model: Model, texts: dict[str, text.Texts], buckets: tuple[int, ...]) -> dict[str, float]:
    """Mean losses of the hidden words of texts by domain, in nats; the words are the same at each call."""
    found = {}
    for name, own in texts.items():
        batches = Batches(own, 32, train=False, buckets=buckets)
        keys = map(jax.random.key, count())
        found[f"mlm_loss_{name}"], _ = mean_loss(MaskedLM(), model, batches, weight="tokens", keys=keys)
    return found


def tuned(config: DomainPretraining, task: Classification, model: Model, seed: int) -> float:
    """Test accuracy after fine-tuning on a few labelled examples, with a new classifier on the mean of the words."""
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
        f"{len(corpora.held_out['other']):,} held-out texts, before fine-tuning, in nats a hidden word; the same words "
        "are hidden from every arm. The masked head is new, and trained first on the frozen body, on equal parts of "
        "both domains; `none` is measured with it. `accuracy` is that of the fine-tuned model on test."
    )


def _sections(rows: ResumableRows) -> list[Section]:
    lines = [
        [arm, *(format_estimate(paired_difference(rows.rows, metric, arm, "none")) for metric in METRICS)]
        for arm in ARMS[1:]
    ]
    curves = {
        name: figures.learning_curves(rows.curves, f"validation_mlm_loss_{name}")
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
