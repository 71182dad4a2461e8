"""A second-order MAML step of jtl beside the same step in torch: batched by torch.func, and in the usual loop.

One step is the mean query gradient of 32 tasks of 5-way 1-shot classification through 5 inner steps on all leaves of
Conv4, batch statistics throughout; the outer update is Adam. Images are 28 x 28, and Conv4 takes strides of 2, as MAML
does on Omniglot (Finn et al. 2017, section 5.2) and ``experiments.fewshot`` on glyphs; with ``--pooling`` it pools.
``functional_torch`` is ``torch.func``: a ``vmap`` over tasks of a function that calls ``grad`` at each inner step.
``loop_torch`` is what users of learn2learn write, which builds on no current Python: for one task after another,
``torch.autograd.grad(..., create_graph=True)`` at each inner step, the network called with the updated leaves, and one
``backward`` of the query loss. All three start from the same leaves and see the same tasks; the run stops if their
meta-gradients differ.

    python -m experiments.benchmarks.maml --out runs/bench_maml

Expected on two CPU cores (``experiments/results/bench_maml.json``, ``--memory-steps 1 5 --rounds 15``, 3 minutes):
``step_ratio`` 5.19 ± 0.44 (``loop_torch``) and 3.30 ± 0.25 (``functional_torch``).

Needs the extra ``bench``. ``step_ratio`` is peer / jtl in seconds a step: above 1, jtl is faster. Rounds alternate,
after compilation. ``memory`` is what the compiled step of jtl holds beside its arguments, in MiB, by inner steps, on
one device and in a loop, where the timed step runs on all devices and has its inner steps written out: ``kept_5`` keeps
the forwards of all 5 steps of a task, ``remat_5`` makes them again in the backward pass, one task after another;
``vmap_5`` runs all tasks at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.benchmarks.cpu_devices import ONE_THREAD, over_cores
from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from jtl import heads, meta, tree
from jtl.errors import InputError
from jtl.model import Model, linen
from jtl.report.report import Result, Section, environment, estimate, write_report, write_result
from jtl.tasks import Classify
from jtl.train import Step, make_step

SAME = (
    3e-2  # relative, of the meta-gradient: batch normalisation over few rows amplifies rounding, step by step
)
WAYS, SIDE = 5, 28
PAUSE = 0.3  # seconds before each step, so that no idle thread of the one before still spins


@dataclass(frozen=True, kw_only=True)
class BenchMaml(Config):
    """Settings of the benchmark."""

    tasks: int = 32
    """Tasks of a step."""
    inner_steps: int = 5
    """Inner steps."""
    queries: int = 5
    """Query images a class."""
    width: int = 64
    """Filters of Conv4."""
    pooling: bool = False
    """Pool after each convolution, as on larger images, where MAML's network for Omniglot takes strides."""
    rate: float = 0.1
    """Rate of the inner steps."""
    devices: int = 2
    """CPU devices over which jtl splits the tasks, a core each; every device runs one task after another."""
    rounds: int = 5
    """Steps of each, alternating."""
    memory_steps: tuple[int, ...] = (1, 5, 10)
    """Inner steps whose memory is printed."""
    threads: int = 2
    """CPU threads of torch; XLA takes all processors there are."""


def run(config: BenchMaml) -> Result:
    """Time all three, alternating; writes into ``config.out`` and returns the result."""
    import torch

    began = time.monotonic()
    for name in ("tasks", "inner_steps", "queries", "rounds"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    cores = over_cores(config.devices)
    out = prepare(config, "bench_maml")
    torch.set_num_threads(config.threads)
    tasks, width = (4, 16) if config.quick else (config.tasks, config.width)
    model = _start(width, config.pooling, config.seed)
    batch = _tasks(tasks, config.queries, config.seed)

    step = _step(config.inner_steps, config.rate, cores, chunk=1, unroll=config.inner_steps)
    state = step.init(model, jax.random.key(config.seed))
    peers = {
        "functional_torch": _Functional(model, batch, config),
        "loop_torch": _Loop(model, batch, config),
    }
    differences = _differences(model, batch, config, peers)

    def own_step() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state.trained)

    for _ in range(2):  # compiles, and touches its memory
        own_step()
    rows: list[dict[str, Any]] = []
    for i in range(1 if config.quick else config.rounds):
        seconds = {}
        for name, take in {"jtl": own_step, **peers}.items():
            time.sleep(PAUSE)
            started = time.monotonic()
            take()
            seconds[name] = time.monotonic() - started
        rows += [{"arm": name, "seed": config.seed, "round": i, "seconds": s} for name, s in seconds.items()]
        print(f"round {i + 1}:", *(f"{name} {s:.2f} s" for name, s in seconds.items()))

    own = [row["seconds"] for row in rows if row["arm"] == "jtl"]
    summary: dict[str, Any] = {
        "step_ratio": {
            name: estimate(
                [b / a for a, b in zip(own, [r["seconds"] for r in rows if r["arm"] == name], strict=True)]
            )
            for name in peers
        },
        "gradient_difference": {name: estimate([value]) for name, value in differences.items()},
    }
    memory = _memory(model, batch, config)
    summary["memory"] = {row["arm"]: estimate([row["mebibytes"]]) for row in memory}
    versions = {**environment(), "torch": torch.__version__}
    result = Result(
        "bench_maml", settings(config), versions, time.monotonic() - began, rows + memory, summary
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title="A step of MAML in jtl beside torch",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("benchmarks.maml", config),
        sections=[
            Section("Memory by inner steps", "Of the compiled step, beside its arguments.", _figure(memory))
        ],
    )
    return result


# --- jtl -------------------------------------------------------------------------------------------


def _start(width: int, pooling: bool, seed: int) -> Model:
    key = jax.random.key(seed)
    module = meta.PatchConv4(width, strided=not pooling)
    model = linen(module, jax.jit(module.init)(key, jnp.zeros((2, SIDE, SIDE, 1))))
    return heads.classifier(model, WAYS, key=key, on="features", width=width if pooling else 4 * width)


def _tasks(tasks: int, queries: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Random images: what they show does not change how long a step takes."""
    rng = np.random.default_rng(seed)

    def part(rows: int) -> dict[str, np.ndarray]:
        label = np.tile(np.repeat(np.arange(WAYS, dtype=np.int32), rows), (tasks, 1))
        image = rng.normal(size=(*label.shape, SIDE, SIDE, 1)).astype(np.float32)
        return {"image": image, "label": label}

    return {"support": part(1), "query": part(queries)}


def _step(steps: int, rate: float, cores: Mesh | None = None, **options: Any) -> Step:
    gradient = meta.maml(steps=steps, rate=rate, **options)
    gradient = gradient if cores is None else meta.sharded(gradient, cores)
    alone = ONE_THREAD if cores is not None and jax.default_backend() == "cpu" else None
    return make_step(
        Classify(stats="batch"), optax.adam(1e-3), gradient=gradient, mesh=cores, compiler_options=alone
    )


def _memory(model: Model, batch: Any, config: BenchMaml) -> list[dict[str, Any]]:
    rows = []
    ways = {"kept": {"chunk": 1}, "remat": {"chunk": 1, "remat": True}, "vmap": {}}
    for steps in config.memory_steps[:2] if config.quick else config.memory_steps:
        for name, options in ways.items():
            compiled = _step(steps, config.rate, **options).lower(model, batch).compile()
            size = compiled.memory_analysis().temp_size_in_bytes / 2**20
            rows.append({"arm": f"{name}_{steps}", "inner_steps": steps, "mebibytes": size})
            print(f"memory, {steps} inner steps, {name}: {size:.0f} MiB")
    return rows


# --- torch -----------------------------------------------------------------------------------------


def _torch_layout(path: str, leaf: Any, pooling: bool) -> np.ndarray:
    """A leaf as torch has it, whose strided convolution pads an even side before it where "SAME" pads after it.

    So with strides torch gets everything upside down and from right to left: images, kernels and the head's rows.
    """
    leaf = np.asarray(leaf)
    turn = slice(None, None, None if pooling else -1)
    if leaf.ndim == 4:
        leaf = leaf[turn, turn].transpose(3, 2, 0, 1)
    elif path == "head/out/kernel":
        side = 1 if pooling else 2
        maps = leaf.reshape(side, side, -1, WAYS)[turn, turn]
        leaf = maps.transpose(3, 2, 0, 1).reshape(WAYS, -1)
    return np.ascontiguousarray(leaf)


def _leaves(model: Model, pooling: bool) -> dict[str, Any]:
    """The leaves of ``model`` in torch's layouts, by path."""
    import torch

    return {
        path: torch.tensor(_torch_layout(path, leaf, pooling), requires_grad=True)
        for path, leaf in tree.flatten(model.params).items()
    }


def _torch_batch(batch: Any, pooling: bool) -> dict[str, tuple[Any, Any]]:
    import torch

    turn = slice(None, None, None if pooling else -1)
    return {
        name: (
            torch.from_numpy(part["image"][:, :, turn, turn].transpose(0, 1, 4, 2, 3).copy()),
            torch.from_numpy(part["label"]).long(),
        )
        for name, part in batch.items()
    }


def _loss(leaves: dict[str, Any], image: Any, label: Any, *, pooling: bool) -> Any:
    """``Classify(stats="batch")`` of Conv4 and its head."""
    import torch.nn.functional as F

    x = image
    for i in range(4):
        x = F.conv2d(x, leaves[f"conv_{i}/kernel"], padding=1, stride=1 if pooling else 2)
        x = F.batch_norm(x, None, None, leaves[f"norm_{i}/scale"], leaves[f"norm_{i}/bias"], training=True)
        x = F.max_pool2d(F.relu(x), 2) if pooling else F.relu(x)
    logits = F.linear(x.flatten(1), leaves["head/out/kernel"], leaves["head/out/bias"])
    return F.cross_entropy(logits, label)


class _Peer:
    """A torch implementation: called, it takes one step."""

    def __init__(self, model: Model, batch: Any, config: BenchMaml) -> None:
        import torch

        self.leaves, self.config = _leaves(model, config.pooling), config
        self.batch = _torch_batch(batch, config.pooling)
        self.loss = partial(_loss, pooling=config.pooling)
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=1e-3)

    def gradient(self) -> None:
        """Adds the meta-gradient to the leaves' ``grad``."""
        raise NotImplementedError

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.gradient()
        self.optimizer.step()


class _Functional(_Peer):
    """torch.func: one program over all tasks."""

    def gradient(self) -> None:
        from torch.func import grad, vmap

        def task(leaves: Any, support: Any, known: Any, query: Any, asked: Any) -> Any:
            for _ in range(self.config.inner_steps):
                slope = grad(self.loss)(leaves, support, known)
                leaves = {name: leaf - self.config.rate * slope[name] for name, leaf in leaves.items()}
            return self.loss(leaves, query, asked)

        def mean(leaves: Any) -> Any:
            over = (None, 0, 0, 0, 0)
            return vmap(task, over)(leaves, *self.batch["support"], *self.batch["query"]).mean()

        found = grad(mean)({name: leaf.detach() for name, leaf in self.leaves.items()})
        for name, leaf in self.leaves.items():
            leaf.grad = found[name]


class _Loop(_Peer):
    """One task after another."""

    def gradient(self) -> None:
        import torch

        tasks = len(self.batch["query"][1])
        for t in range(tasks):
            (support, known), (query, asked) = (
                tuple(x[t] for x in self.batch[part]) for part in ("support", "query")
            )
            adapted = dict(self.leaves)
            for _ in range(self.config.inner_steps):
                slopes = torch.autograd.grad(
                    self.loss(adapted, support, known), list(adapted.values()), create_graph=True
                )
                adapted = {
                    name: leaf - self.config.rate * slope
                    for (name, leaf), slope in zip(adapted.items(), slopes, strict=True)
                }
            (self.loss(adapted, query, asked) / tasks).backward()


def _differences(model: Model, batch: Any, config: BenchMaml, peers: dict[str, _Peer]) -> dict[str, float]:
    """How far each peer's meta-gradient is from jtl's, relative. Raises RuntimeError if it is another function."""
    gradient = meta.maml(steps=config.inner_steps, rate=config.rate, chunk=1)
    loss = Classify(stats="batch")

    def on(params: PyTree, batch: Any, key: Any) -> Any:
        return loss(model.with_params(params), batch, key)

    _, ours = jax.jit(lambda params, batch: gradient(on, params, batch, jax.random.key(0)))(
        model.params, batch
    )
    own = {path: _torch_layout(path, leaf, config.pooling) for path, leaf in tree.flatten(ours).items()}
    norm = np.sqrt(sum(float(np.sum(leaf**2)) for leaf in own.values()))
    found = {}
    for name, peer in peers.items():
        peer.gradient()
        apart = [np.sum((leaf.grad.numpy() - own[path]) ** 2) for path, leaf in peer.leaves.items()]
        found[name] = float(np.sqrt(sum(apart)) / norm)
        if found[name] > SAME:
            raise RuntimeError(
                f"the meta-gradient of {name} is {found[name]:.1e} from jtl's, relative: not the same function"
            )
    return found


def _figure(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["arm"].split("_")[0] for row in rows):
        own = [row for row in rows if row["arm"].startswith(name)]
        axes.plot([r["inner_steps"] for r in own], [r["mebibytes"] for r in own], marker="o", label=name)
    axes.set(xlabel="inner steps", ylabel="MiB", yscale="log")
    axes.legend()
    return figure


if __name__ == "__main__":
    main(run, BenchMaml)
