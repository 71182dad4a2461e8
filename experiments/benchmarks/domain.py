"""Domain adaptation beside skada (torch): same images, network, start, loss, optimiser and updates, in one run.

``step_ratio`` is peer / jtl in seconds an example: above 1, jtl is faster. ``skada_*`` is its trainer over
``jtl.train.fit``, ``torch_*`` a bare loop over skada's module over a bare loop of jtl's step. The run stops where the
losses or gradients of both are not the same function.

    python -m experiments.benchmarks.domain --out runs/bench_domain

Needs the extra ``bench``. pytorch-adapt is left out: the torchmetrics that it pins imports ``pkg_resources``, which
setuptools no longer has.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.benchmarks import skada_peer
from experiments.benchmarks.cpu_devices import over_cores
from experiments.benchmarks.timing import ratio, timed_updates
from experiments.common import Config, above, at_least, finish, main, prepare
from experiments.domain_adaptation.domains import DomainPair, prepare_domains
from experiments.domain_adaptation.methods import HIDDEN, TARGET_SEED
from jtl import domain
from jtl.data.batches.loader import Batches, loader
from jtl.data.batches.mixing import SideBySide
from jtl.loss import Loss
from jtl.model import Model
from jtl.outputs import predict
from jtl.report import Result, estimate, paired_difference, summarise
from jtl.tasks import Classify, accuracy
from jtl.train import adamw, fit, make_step

ABOUT = """MNIST-5k to MNIST-M, the network of the study of domain adaptation (Conv4) and the same first weights,
batches of as many source as target images normalised together, AdamW at a constant rate without clipping, and every
leaf decays. dann is a discriminator of 100 hidden units behind a reversal of strength 0.1, which skada holds constant,
coral the covariances of the logits, both with weight 1: skada's own losses are the same functions (DANNLoss takes a
mean over each domain and adds them; deepcoral_loss divides by 4 D²). The strength was set in short trials of jtl that
showed target accuracy. Each run checks that on one batch: loss_difference is |jtl - skada|, gradient_difference the
norm of the difference over that of skada's. skada_* is its trainer (skorch, as skorch times an epoch, data loader
included) over jtl.train.fit with jtl's loader; torch_* a bare torch loop over skada's module and loss over a bare loop
of jtl's step, both on batches made before. Rounds alternate, after compilation. accuracy is that of the target's test
images at the end of the run, which no rule chose."""
Method = Literal["dann", "coral"]
METHODS: tuple[Method, ...] = ("dann", "coral")
SAME = 1e-3  # relative: the same function in float32 differs by less, another weight or sign by far more
DECAY = 0.01
REVERSAL = 0.1  # at 1 from the first update, without a ramp, the classifier does not settle


@dataclass(frozen=True, kw_only=True)
class BenchDomain(Config):
    """Settings of the benchmark."""

    rounds: int = at_least(1, 9)
    """Epochs of training, each a round of the timing."""
    bare_steps: int = at_least(1, 20)
    """Updates of a round of the bare loops."""
    batch_size: int = at_least(1, 32)
    """Images of each domain in an update."""
    learning_rate: float = above(0, 2e-3)
    """Rate of AdamW."""
    seeds: int = at_least(1, 3)
    """Repetitions."""
    threads: int = at_least(1, 2)
    """CPU threads of torch; XLA takes all processors there are."""
    devices: int = at_least(1, 2)
    """CPU devices over which jtl splits a batch, a core each."""


def run(config: BenchDomain) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import skada
    import skorch
    import torch

    began = time.monotonic()
    prepare(config, "bench_domain")
    cores = over_cores(config.devices)
    torch.set_num_threads(config.threads)
    few, test = (200, 200) if config.quick else (500, 1000)
    pair = prepare_domains("mnist_m", "mnist5k", "mnist_m", validation=few, test=test)
    timed: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        for method in METHODS:
            rounds, ends = _compare(pair, method, seed, config, cores)
            timed += rounds
            found += ends
            print(*(f"{row['arm']} {row['accuracy']:.3f}" for row in ends))

    summary: dict[str, Any] = {
        "step_ratio": {
            f"{peer}_{method}": ratio(timed, "seconds_per_example", f"{peer}_{method}", f"{own}_{method}")
            for peer, own in (("skada", "jtl"), ("torch", "jtl_step"))
            for method in METHODS
        }
    }
    summary |= summarise(found, ["accuracy"])
    summary["accuracy_difference"] = {
        method: paired_difference(found, "accuracy", f"jtl_{method}", f"skada_{method}") for method in METHODS
    }
    for metric in ("loss_difference", "gradient_difference"):
        summary[metric] = {
            method: estimate([row[metric] for row in found if row["arm"] == f"skada_{method}"])
            for method in METHODS
        }
    versions = {package.__name__: package.__version__ for package in (torch, skada, skorch)}
    return finish(
        "bench_domain", config, timed + found, (), title="Domain adaptation in jtl beside skada", about=ABOUT,
        summary=summary, seconds=time.monotonic() - began, versions=versions,
    )  # fmt: skip


def _compare(
    pair: DomainPair, method: Method, seed: int, config: BenchDomain, cores: Mesh | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every round, and those of the ends of the run."""
    start, loss = _start(pair, method, seed)
    optimizer = adamw(config.learning_rate, weight_decay=DECAY, decay=[(".*", True)], clip=None)
    step = make_step(loss, optimizer, mesh=cores)
    key = jax.random.key(seed)
    batches = _epoch(pair, (seed, 0), config)
    fit(step, step.init(start, key), loader(batches), steps=2, progress=False)  # compiles
    examples = 2 * config.batch_size

    net, bare = (
        skada_peer.net_of(
            start, method, seed=seed, learning_rate=config.learning_rate, batch_size=config.batch_size, decay=DECAY,
            reversal=REVERSAL,
        )
        for _ in range(2)
    )  # fmt: skip
    differences = _differences(start, loss, bare, batches[0])
    few = [batches[i] for i in range(config.bare_steps)]
    tensors = [skada_peer.tensors(batch) for batch in few]
    dataset = skada_peer.dataset_of(pair)

    state, bare_state = step.init(start, key), step.init(start, key)
    bare_state, _ = timed_updates(step, bare_state, few[:2])
    skada_peer.timed_updates(bare, tensors[:2])
    rows: list[dict[str, Any]] = []
    for i in range(1 if config.quick else config.rounds):
        batches = _epoch(pair, (seed, i), config)
        began = time.monotonic()
        fitted = fit(step, state, loader(batches), steps=(i + 1) * len(batches), progress=False)
        jax.block_until_ready(fitted.state.trained)
        seconds = {"jtl": (time.monotonic() - began) / len(batches)}
        state = fitted.state
        net.partial_fit(dataset)
        if (updates := len(net.history[-1]["batches"])) != len(batches):
            raise RuntimeError(
                f"skada made {updates} updates in an epoch, jtl {len(batches)}: not the same work"
            )
        seconds["skada"] = net.history[-1]["dur"] / updates
        bare_state, spent = timed_updates(step, bare_state, few)
        seconds["jtl_step"] = spent / len(few)
        seconds["torch"] = skada_peer.timed_updates(bare, tensors) / len(few)
        rows += [
            {"arm": f"{arm}_{method}", "seed": seed, "round": i, "seconds_per_example": own / examples}
            for arm, own in seconds.items()
        ]
        print(
            f"seed {seed}  round {i + 1}  {method}:", *(f"{a} {1e3 * s:.1f} ms" for a, s in seconds.items())
        )

    test = pair.target["test"]
    logits, labels = predict(state.model, Batches(test, 100, train=False))
    ends = [
        {"arm": f"jtl_{method}", "seed": seed, "accuracy": accuracy(logits, labels)},
        {
            "arm": f"skada_{method}",
            "seed": seed,
            "accuracy": skada_peer.accuracy_of(net, test),
            **differences,
        },
    ]
    return rows, ends


def _start(pair: DomainPair, method: Method, seed: int) -> tuple[Model, Loss]:
    """The model before training and what it minimises."""
    model = pair.start(jax.random.key(seed))
    supervised = domain.Source(Classify(stats="batch"))
    if method == "coral":
        return model, supervised + domain.CORAL(on="logits", stats="batch")
    key = jax.random.fold_in(jax.random.key(seed), 1)
    model = domain.adversary(model, horizon=None, peak=REVERSAL, key=key, width=pair.width, hidden=HIDDEN)
    return model, supervised + domain.DANN(stats="batch")


def _epoch(pair: DomainPair, seed: tuple[int, int], config: BenchDomain) -> SideBySide:
    """Every source and target example once, in an order of its own."""
    order = int(np.random.default_rng(seed).integers(2**31))
    splits = pair.source["train"], pair.target["train"]
    seeds = (order, order + TARGET_SEED)  # or each batch would hold the same digits on both sides
    return SideBySide(
        [Batches(s, config.batch_size, seed=seed) for s, seed in zip(splits, seeds, strict=True)]
    )


def _differences(model: Model, loss: Loss, net: Any, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far the two losses and their gradients are apart on ``batch``.

    Raises RuntimeError if they are not the same function.
    """

    def value(params: PyTree) -> Any:
        return loss(model.with_params(params), batch, jax.random.key(0))[0]

    ours, gradient = jax.jit(jax.value_and_grad(value))(model.params)
    x, label = skada_peer.tensors(batch)
    net.module_.train()
    theirs = net.criterion_(net.module_(**x), label)
    theirs.backward()
    named = skada_peer.named(gradient)
    own = {name: leaf.grad.numpy() for name, leaf in net.module_.named_parameters()}
    norm = np.sqrt(sum(float(np.sum(leaf**2)) for leaf in own.values()))
    apart = np.sqrt(sum(float(np.sum((named[name] - leaf) ** 2)) for name, leaf in own.items())) / norm
    net.optimizer_.zero_grad()
    theirs = float(theirs.detach())
    if abs(float(ours) - theirs) > SAME * abs(theirs) or apart > SAME:
        raise RuntimeError(
            f"skada's loss is {theirs:.6f} and jtl's {float(ours):.6f}, their gradients {apart:.1e} apart: not the "
            "same function. This benchmark was written for skada 0.6.0; compare its losses with those described above"
        )
    return {"loss_difference": abs(float(ours) - theirs), "gradient_difference": float(apart)}


if __name__ == "__main__":
    main(run, BenchDomain)
