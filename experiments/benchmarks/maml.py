"""A second-order MAML step of jtl beside the same step in torch: batched by torch.func, and in the usual loop.

``step_ratio`` is peer / jtl in seconds a step: above 1, jtl is faster. ``functional_torch`` is ``torch.func``,
``loop_torch`` what users of learn2learn write, which builds on no current Python. The run stops if their meta-gradients
differ. ``memory`` is what the compiled step of jtl holds beside its arguments, by inner steps.

    python -m experiments.benchmarks.maml --out runs/bench_maml

Images are 28 x 28, and Conv4 takes strides of 2, as MAML does on Omniglot (Finn et al. 2017,
https://arxiv.org/abs/1703.03400, section 5.2); with ``--pooling`` it pools. Needs the extra ``bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.benchmarks.cpu_devices import ONE_THREAD, over_cores
from experiments.benchmarks.maml_torch import SIDE, WAYS, Functional, Loop, Peer, torch_layout
from experiments.benchmarks.timing import ratio
from experiments.common import Config, above, at_least, finish, main, prepare
from jtl import heads, meta, tree
from jtl.model import Model, linen
from jtl.report import Result, Section, estimate
from jtl.tasks import Classify
from jtl.train import Step, make_step

ABOUT = """One step is the mean query gradient over tasks of 5-way 1-shot classification through the inner steps on all
leaves of Conv4, batch statistics throughout; the outer update is Adam. functional_torch is torch.func: a vmap over
tasks of a function that calls grad at each inner step. loop_torch is what users of learn2learn write: for one task
after another, torch.autograd.grad(..., create_graph=True) at each inner step, the network called with the updated
leaves, and one backward of the query loss. All three start from the same leaves and see the same tasks, and their
meta-gradients agree. step_ratio is peer / jtl in seconds a step: above 1, jtl is faster. Rounds alternate, after
compilation. memory is what the compiled step of jtl holds beside its arguments, in MiB, by inner steps, on one device
and in a loop, where the timed step runs on all devices and has its inner steps written out: kept_5 keeps the forwards
of all 5 steps of a task, remat_5 makes them again in the backward pass, one task after another; vmap_5 runs all tasks
at once."""
SAME = (
    3e-2  # relative, of the meta-gradient: batch normalisation over few rows amplifies rounding, step by step
)
PAUSE = 0.3  # seconds before each step, so that no idle thread of the one before still spins


@dataclass(frozen=True, kw_only=True)
class BenchMaml(Config):
    """Settings of the benchmark."""

    tasks: int = at_least(1, 32)
    """Tasks of a step."""
    inner_steps: int = at_least(1, 5)
    """Inner steps."""
    queries: int = at_least(1, 5)
    """Query images a class."""
    width: int = at_least(1, 64)
    """Filters of Conv4."""
    pooling: bool = False
    """Pool after each convolution, as on larger images, where MAML's network for Omniglot takes strides."""
    rate: float = above(0, 0.1)
    """Rate of the inner steps."""
    devices: int = at_least(1, 2)
    """CPU devices over which jtl splits the tasks, a core each; every device runs one task after another."""
    rounds: int = at_least(1, 5)
    """Steps of each, alternating."""
    memory_steps: tuple[int, ...] = at_least(1, (1, 5, 10))
    """Inner steps whose memory is printed."""
    threads: int = at_least(1, 2)
    """CPU threads of torch; XLA takes all processors there are."""


def run(config: BenchMaml) -> Result:
    """Time all three, alternating; writes into ``config.out`` and returns the result."""
    import torch

    began = time.monotonic()
    prepare(config, "bench_maml")
    cores = over_cores(config.devices)
    torch.set_num_threads(config.threads)
    tasks, width = (4, 16) if config.quick else (config.tasks, config.width)
    model = _start(width, config.pooling, config.seed)
    batch = _tasks(tasks, config.queries, config.seed)

    step = _step(config.inner_steps, config.rate, cores, chunk=1, unroll=config.inner_steps)
    state = step.init(model, jax.random.key(config.seed))
    ways: dict[str, type[Peer]] = {"functional_torch": Functional, "loop_torch": Loop}
    peers = {
        name: peer(model, batch, inner_steps=config.inner_steps, rate=config.rate, pooling=config.pooling)
        for name, peer in ways.items()
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
        takes: dict[str, Callable[[], None]] = {"jtl": own_step, **peers}
        for name, take in takes.items():
            time.sleep(PAUSE)
            started = time.monotonic()
            take()
            seconds[name] = time.monotonic() - started
        rows += [{"arm": name, "seed": config.seed, "round": i, "seconds": s} for name, s in seconds.items()]
        print(f"round {i + 1}:", *(f"{name} {s:.2f} s" for name, s in seconds.items()))

    summary: dict[str, Any] = {
        "step_ratio": {name: ratio(rows, "seconds", name) for name in peers},
        "gradient_difference": {name: estimate([value]) for name, value in differences.items()},
    }
    memory = _memory(model, batch, config)
    summary["memory"] = {row["arm"]: estimate([row["mebibytes"]]) for row in memory}
    memory_section = Section(
        "Memory by inner steps", "Of the compiled step, beside its arguments.", _figure(memory)
    )
    return finish(
        "bench_maml", config, rows + memory, [memory_section], title="A step of MAML in jtl beside torch", about=ABOUT,
        summary=summary, seconds=time.monotonic() - began, versions={"torch": torch.__version__},
    )  # fmt: skip


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
    ways: dict[str, dict[str, Any]] = {"kept": {"chunk": 1}, "remat": {"chunk": 1, "remat": True}, "vmap": {}}
    for steps in config.memory_steps[:2] if config.quick else config.memory_steps:
        for name, options in ways.items():
            compiled = _step(steps, config.rate, **options).lower(model, batch).compile()
            size = compiled.memory_analysis().temp_size_in_bytes / 2**20
            rows.append({"arm": f"{name}_{steps}", "inner_steps": steps, "mebibytes": size})
            print(f"memory, {steps} inner steps, {name}: {size:.0f} MiB")
    return rows


def _differences(model: Model, batch: Any, config: BenchMaml, peers: dict[str, Peer]) -> dict[str, float]:
    """How far each peer's meta-gradient is from jtl's, relative. Raises RuntimeError if it is another function."""
    gradient = meta.maml(steps=config.inner_steps, rate=config.rate, chunk=1)
    loss = Classify(stats="batch")

    def on(params: PyTree, batch: Any, key: Any) -> Any:
        return loss(model.with_params(params), batch, key)

    _, ours = jax.jit(lambda params, batch: gradient(on, params, batch, jax.random.key(0)))(
        model.params, batch
    )
    own = {path: torch_layout(path, leaf, config.pooling) for path, leaf in tree.flatten(ours).items()}
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
