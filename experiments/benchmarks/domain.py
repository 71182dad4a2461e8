"""Domain adaptation beside skada (torch): same images, network, start, loss, optimiser and updates, in one run.

MNIST-5k to MNIST-M, the network of ``experiments.domain_adaptation`` (Conv4) and the same first weights, batches of 32
source and 32 target images normalised together, AdamW at a constant rate without clipping, and every leaf decays.
``dann`` is a discriminator of 100 hidden units behind a reversal of strength 0.1, which skada holds constant,
``coral`` the covariances of the logits, both with weight 1: skada's own losses are the same functions (``DANNLoss``
takes a mean over each domain and adds them; ``deepcoral_loss`` divides by 4 D²). The strength was set in short trials
of jtl that showed target accuracy. Each run checks that on one batch:
``loss_difference`` is |jtl - skada|, ``gradient_difference`` the norm of the difference over that of skada's; it stops
where they are not the same function.

    python -m experiments.benchmarks.domain --out runs/bench_domain

Expected on two CPU cores, ``--rounds 4``, three seeds, in 4 minutes (``experiments/results/bench_domain.json``):
``step_ratio`` 1.13 ± 0.09 (``skada_dann``) and 1.15 ± 0.07 (``skada_coral``), 1.18 ± 0.07 and 1.28 ± 0.10 beside bare
torch; accuracies differ by 0.027 ± 0.157 (``dann``) and -0.044 ± 0.118 (``coral``). On one device (``--devices 1``)
they were 1.05 ± 0.02, 1.00 ± 0.02, 1.03 ± 0.04 and 1.02 ± 0.04: see ``experiments.benchmarks.cpu_devices``.

Needs the extra ``bench``. ``step_ratio`` is peer / jtl in seconds an example: above 1, jtl is faster. ``skada_*`` is
its trainer (skorch, as skorch times an epoch, data loader included) over ``jtl.train.fit`` with jtl's loader;
``torch_*`` a bare torch loop over skada's module and loss over a bare loop of jtl's step, both on batches made before.
Rounds alternate, after compilation. ``accuracy`` is that of the target's test images at the end of the run, which no
rule chose: what the methods are worth is for ``experiments.domain_adaptation`` to say.

The discriminator is ours because that of skada 0.6.0 ends in a softmax over its single output, which is 1 whatever the
features, so that its gradient is 0. pytorch-adapt 0.0.83 is left out: the torchmetrics 0.9.3 that it pins imports
``pkg_resources``, which setuptools no longer has.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.benchmarks.cpu_devices import over_cores
from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from experiments.domain_adaptation.domains import CONV4_WIDTH, DomainPair, prepare_domains
from experiments.domain_adaptation.methods import HIDDEN, TARGET_SEED
from jtl import domain, tree
from jtl.data.batches.loader import Batches, Encoded, loader
from jtl.data.batches.mixing import SideBySide
from jtl.loss import Loss
from jtl.model import Model
from jtl.outputs import predict
from jtl.report.report import (
    Result,
    environment,
    estimate,
    paired_difference,
    summarise,
    write_report,
    write_result,
)
from jtl.tasks import Classify, accuracy
from jtl.train import Step, adamw, fit, make_step

Method = Literal["dann", "coral"]
METHODS: tuple[Method, ...] = ("dann", "coral")
SAME = 1e-3  # relative: the same function in float32 differs by less, another weight or sign by far more
DECAY = 0.01
REVERSAL = 0.1  # at 1 from the first update, without a ramp, the classifier does not settle


@dataclass(frozen=True, kw_only=True)
class BenchDomain(Config):
    """Settings of the benchmark."""

    rounds: int = 9
    """Epochs of training, each a round of the timing."""
    bare_steps: int = 20
    """Updates of a round of the bare loops."""
    batch_size: int = 32
    """Images of each domain in an update."""
    learning_rate: float = 2e-3
    """Rate of AdamW."""
    seeds: int = 3
    """Repetitions."""
    threads: int = 2
    """CPU threads of torch; XLA takes all processors there are."""
    devices: int = 2
    """CPU devices over which jtl splits a batch, a core each."""


def run(config: BenchDomain) -> Result:
    """Run both, alternating; writes into ``config.out`` and returns the result."""
    import skada
    import skorch
    import torch

    began = time.monotonic()
    cores = over_cores(config.devices)
    out = prepare(config, "bench_domain")
    torch.set_num_threads(config.threads)
    few, test = (200, 200) if config.quick else (500, 1000)
    transfer = prepare_domains("mnist_m", "mnist5k", "mnist_m", validation=few, test=test)
    timed: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        for method in METHODS:
            rounds, ends = _compare(transfer, method, seed, config, cores)
            timed += rounds
            found += ends
            print(*(f"{row['arm']} {row['accuracy']:.3f}" for row in ends))

    summary: dict[str, Any] = {"step_ratio": {}}
    for peer, own in (("skada", "jtl"), ("torch", "jtl_step")):
        for method in METHODS:
            theirs, ours = (
                [row["seconds_per_example"] for row in timed if row["arm"] == f"{arm}_{method}"]
                for arm in (peer, own)
            )
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            summary["step_ratio"][f"{peer}_{method}"] = estimate(ratios)
    summary |= summarise(found, ["accuracy"])
    summary["accuracy_difference"] = {
        method: paired_difference(found, "accuracy", f"jtl_{method}", f"skada_{method}") for method in METHODS
    }
    for metric in ("loss_difference", "gradient_difference"):
        summary[metric] = {
            method: estimate([row[metric] for row in found if row["arm"] == f"skada_{method}"])
            for method in METHODS
        }
    versions = {
        **environment(),
        **{package.__name__: package.__version__ for package in (torch, skada, skorch)},
    }
    result = Result(
        "bench_domain", settings(config), versions, time.monotonic() - began, timed + found, summary
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title="Domain adaptation in jtl beside skada",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("benchmarks.domain", config),
    )
    return result


def _compare(
    transfer: DomainPair, method: Method, seed: int, config: BenchDomain, cores: Mesh | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every round, and those of the ends of the run."""
    start, loss = _start(transfer, method, seed)
    optimizer = adamw(config.learning_rate, weight_decay=DECAY, decay=[(".*", True)], clip=None)
    step = make_step(loss, optimizer, mesh=cores)
    key = jax.random.key(seed)
    batches = _epoch(transfer, (seed, 0), config)
    fit(step, step.init(start, key), loader(batches), steps=2, progress=False)  # compiles
    examples = 2 * config.batch_size

    net, bare = (_net(start, method, seed, config) for _ in range(2))
    differences = _differences(start, loss, bare, batches[0])
    few = [batches[i] for i in range(config.bare_steps)]
    tensors = [_tensors(batch) for batch in few]
    dataset = _dataset(transfer)

    state, bare_state = step.init(start, key), step.init(start, key)
    bare_state, _ = _jax_round(step, bare_state, few[:2])
    _torch_round(bare, tensors[:2])
    rows: list[dict[str, Any]] = []
    for i in range(1 if config.quick else config.rounds):
        batches = _epoch(transfer, (seed, i), config)
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
        bare_state, spent = _jax_round(step, bare_state, few)
        seconds["jtl_step"] = spent / len(few)
        seconds["torch"] = _torch_round(bare, tensors) / len(few)
        rows += [
            {"arm": f"{arm}_{method}", "seed": seed, "round": i, "seconds_per_example": own / examples}
            for arm, own in seconds.items()
        ]
        print(
            f"seed {seed}  round {i + 1}  {method}:", *(f"{a} {1e3 * s:.1f} ms" for a, s in seconds.items())
        )

    test = transfer.target["test"]
    logits, labels = predict(state.model, Batches(test, 100, train=False))
    ends = [
        {"arm": f"jtl_{method}", "seed": seed, "accuracy": accuracy(logits, labels)},
        {"arm": f"skada_{method}", "seed": seed, "accuracy": _torch_accuracy(net, test), **differences},
    ]
    return rows, ends


# --- jtl -------------------------------------------------------------------------------------------


def _start(transfer: DomainPair, method: Method, seed: int) -> tuple[Model, Loss]:
    """The model before training and what it minimises."""
    model = transfer.start(jax.random.key(seed))
    supervised = domain.Source(Classify(stats="batch"))
    if method == "coral":
        return model, supervised + domain.CORAL(on="logits", stats="batch")
    key = jax.random.fold_in(jax.random.key(seed), 1)
    model = domain.adversary(model, horizon=None, peak=REVERSAL, key=key, width=transfer.width, hidden=HIDDEN)
    return model, supervised + domain.DANN(stats="batch")


def _epoch(transfer: DomainPair, seed: tuple[int, int], config: BenchDomain) -> SideBySide:
    """Every source and target example once, in an order of its own."""
    order = int(np.random.default_rng(seed).integers(2**31))
    splits = transfer.source["train"], transfer.target["train"]
    seeds = (order, order + TARGET_SEED)  # or each batch would hold the same digits on both sides
    return SideBySide(
        [Batches(s, config.batch_size, seed=seed) for s, seed in zip(splits, seeds, strict=True)]
    )


def _jax_round(step: Step, state: Any, batches: Sequence[Any]) -> tuple[Any, float]:
    began = time.monotonic()
    for batch in batches:
        state, _ = step(state, batch)
    jax.block_until_ready(state.trained)
    return state, time.monotonic() - began


# --- skada -----------------------------------------------------------------------------------------


def _net(model: Model, method: Method, seed: int, config: BenchDomain) -> Any:
    """skada's trainer, with the very leaves of ``model``."""
    import torch
    from skada import deep
    from skada.deep.modules import DomainClassifier

    torch.manual_seed(seed)  # of the order of examples
    leaves = {name: torch.tensor(leaf) for name, leaf in _named(model.params).items()}
    network = _network(classes=len(leaves["base_module_.head.bias"]))
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW, "optimizer__weight_decay": DECAY, "lr": config.learning_rate,
        "batch_size": config.batch_size, "max_epochs": 1, "train_split": None, "verbose": 0,
    }  # fmt: skip
    if method == "coral":
        net = deep.DeepCoral(network, "head", **options)
    else:
        discriminator = DomainClassifier(
            CONV4_WIDTH, alpha=REVERSAL
        )  # its reversal, with other layers behind
        (hidden,) = HIDDEN
        discriminator.classifier = torch.nn.Sequential(
            torch.nn.Linear(CONV4_WIDTH, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)
        )
        options |= {"domain_classifier": discriminator, "domain_criterion": torch.nn.BCEWithLogitsLoss()}
        net = deep.DANN(network, "features", **options)
    net.initialize()
    net.module_.load_state_dict({**net.module_.state_dict(), **leaves})
    return net


def _network(classes: int) -> Any:
    """``jtl.models.conv4.Conv4`` and its classifier in torch."""
    from torch import nn

    layers: dict[str, nn.Module] = {}
    for i in range(4):
        layers[f"conv_{i}"] = nn.Conv2d(3 if i == 0 else CONV4_WIDTH, CONV4_WIDTH, 3, padding=1, bias=False)
        layers[f"norm_{i}"] = nn.BatchNorm2d(CONV4_WIDTH, eps=1e-5, momentum=0.01)  # Flax's 0.99
        layers[f"relu_{i}"], layers[f"pool_{i}"] = nn.ReLU(), nn.MaxPool2d(2)
    layers["features"] = nn.Flatten()
    layers["head"] = nn.Linear(CONV4_WIDTH, classes)
    return nn.Sequential(OrderedDict(layers))


MODULES = {
    "head/out": "base_module_.head",
    "discriminator/dense_0": "domain_classifier_.classifier.0",
    "discriminator/out": "domain_classifier_.classifier.2",
}


def _named(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by their names and in their layouts in skada's module."""
    named = {}
    for path, leaf in tree.flatten(params).items():
        module, name = path.rsplit("/", 1)
        module = MODULES.get(module, f"base_module_.{module}")
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        name = "bias" if name == "bias" else "weight"
        named[f"{module}.{name}"] = np.ascontiguousarray(np.transpose(leaf, axes))
    return named


def _torch_images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _tensors(batch: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Any]:
    """A batch as skada's module takes it, which knows target rows by a number below 0, and its labels."""
    import torch

    x = {
        "X": _torch_images(batch["image"]),
        "sample_domain": torch.from_numpy(np.where(batch["domain"] == 0, 1, -2)),
    }
    return x, torch.from_numpy(batch["label"]).long()


def _dataset(transfer: DomainPair) -> Any:
    """All training examples, those of the target without labels."""
    from skada.deep.base import DeepDADataset

    own, other = (
        split.batch(np.arange(len(split)), 1, None)
        for split in (transfer.source["train"], transfer.target["train"])
    )
    return DeepDADataset(
        _torch_images(np.concatenate([own["image"], other["image"]])),
        np.concatenate([own["label"].astype(np.int64), np.full(len(other["label"]), -1)]),
        np.repeat([1, -2], [len(own["label"]), len(other["label"])]),
    )


def _differences(model: Model, loss: Loss, net: Any, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far the two losses and their gradients are apart on ``batch``.

    Raises RuntimeError if they are not the same function.
    """

    def value(params: PyTree) -> Any:
        return loss(model.with_params(params), batch, jax.random.key(0))[0]

    ours, gradient = jax.jit(jax.value_and_grad(value))(model.params)
    x, label = _tensors(batch)
    net.module_.train()
    theirs = net.criterion_(net.module_(**x), label)
    theirs.backward()
    named = _named(gradient)
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


def _torch_round(net: Any, batches: Sequence[tuple[dict[str, Any], Any]]) -> float:
    """Seconds of a bare loop over skada's module, loss and optimiser."""
    module, optimizer = net.module_.train(), net.optimizer_
    began = time.monotonic()
    for x, label in batches:
        loss = net.criterion_(module(**x), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - began


def _torch_accuracy(net: Any, split: Encoded) -> float:
    import torch

    rows = split.batch(np.arange(len(split)), 1, None)
    with torch.no_grad():
        logits = net.module_.base_module_.eval()(_torch_images(rows["image"]))
    return accuracy(logits.numpy(), rows["label"])


if __name__ == "__main__":
    main(run, BenchDomain)
