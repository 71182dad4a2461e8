"""A small real task for the tests of the loop: an MLP with dropout and batch norm on the UCI digits.

Run as a script it trains to the end, or is killed on the way, and writes the bits of what it learnt:
``python digits_task.py FOLDER RESULT [--resume] [--die WHERE N]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from functools import cache
from pathlib import Path

import flax.linen as nn
import grain
import jax
import numpy as np

from jtl import heads, tree
from jtl import model as models
from jtl.outputs import predict
from jtl.tasks import classify
from jtl.train import Checkpoints, adamw, checkpoint, fit, make_step, schedule

STEPS, EVERY = 60, 6


class MLP(nn.Module):
    """64 -> 32, normalised, with dropout."""

    @nn.compact
    def __call__(self, image, *, train: bool = False, use_running_average: bool = True):
        x = nn.Dense(32, name="first")(image)
        x = nn.BatchNorm(use_running_average=use_running_average, name="norm")(nn.relu(x))
        return {"features": nn.Dropout(0.1, deterministic=not train)(x)}


@cache
def data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Train (1,500) and test (297) arrays. Read without importing scikit-learn, which takes seconds."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",")
    fields = {"image": (table[:, :-1] / 16).astype(np.float32), "label": table[:, -1].astype(np.int32)}
    return {k: v[:1500] for k, v in fields.items()}, {k: v[1500:] for k, v in fields.items()}


def loader(fields: dict[str, np.ndarray], seconds: float = 0.0) -> grain.IterDataset:
    """Endless shuffled batches of 32."""

    class Rows:
        def __len__(self) -> int:
            return len(fields["label"])

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            time.sleep(seconds / 32)
            return {name: rows[index] for name, rows in fields.items()}

    source = grain.MapDataset.source(Rows()).shuffle(seed=3).repeat()
    return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)).batch(32)


def evaluation_batches(fields: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Batches of 64 in order, the last filled up with rows of weight 0."""
    batches = []
    for start in range(0, len(fields["label"]), 64):
        part = {name: rows[start : start + 64] for name, rows in fields.items()}
        real = len(part["label"])
        part = {n: np.pad(x, [(0, 64 - real)] + [(0, 0)] * (x.ndim - 1)) for n, x in part.items()}
        batches.append(part | {"weight": (np.arange(64) < real).astype(np.float32)})
    return batches


@cache
def model(seed: int = 0) -> models.Model:
    """The MLP and a head."""
    key, head_key = jax.random.split(jax.random.key(seed))
    variables = jax.jit(MLP().init)(key, np.zeros((1, 64), np.float32))
    return heads.classifier(models.linen(MLP(), variables), 10, key=head_key, on="features", width=32)


def step(rate: float = 3e-3, **options):
    """The train step."""
    return make_step(classify.Classify(stats="batch"), adamw(schedule(rate, STEPS)), **options)


def validate(model: models.Model) -> dict[str, float]:
    """Accuracy on the test split."""
    return {"accuracy": classify.accuracy(*predict(model, evaluation_batches(data()[1])))}


def _die(where: str, count: int) -> None:
    """Let the process kill itself at the ``count``-th time that a save reaches ``where``."""
    owner = {"write_file": checkpoint, "_hashes": checkpoint, "replace": os, "rmtree": checkpoint.shutil}[
        where
    ]
    original, calls = getattr(owner, where), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, where, dying)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("result", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die", nargs=2)
    parser.add_argument("--seconds", type=float, default=0.0)
    args = parser.parse_args()
    if args.die:
        _die(args.die[0], int(args.die[1]))
    run = step()
    fitted = fit(
        run,
        run.init(model(), jax.random.key(1)),
        loader(data()[0], args.seconds),
        steps=STEPS,
        validate=validate,
        validate_every=2 * EVERY,
        checkpoints=Checkpoints(args.folder),
        save_every=EVERY,
        resume=args.resume,
    )
    leaves = {f"last/{p}": x for p, x in tree.flatten(fitted.state.replace(frozen=None, key=None)).items()}
    leaves |= {f"best/{p}": x for p, x in tree.flatten(fitted.model.variables).items()}
    curve = np.array([[r["step"], r["loss"], r.get("validation_accuracy", -1)] for r in fitted.history])
    np.savez(args.result, curve=curve, **{p.replace("/", "."): np.asarray(x) for p, x in leaves.items()})
    print("done", fitted.best, file=sys.stderr)


if __name__ == "__main__":
    main()
