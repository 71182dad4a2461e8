"""Several processes train as one does: each starts with its own copy of the model and holds its rows of a batch."""

import json
import os
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax

from jtl import heads, sharding
from jtl.model import linen
from jtl.tasks import Classify
from jtl.train import make_step

RULES = {"replicated": sharding.REPLICATED, "sharded": sharding.FULLY_SHARDED}


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        hidden = nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(image))
        return {"features": nn.relu(hidden)}


def losses(devices, rules):
    """The losses of three steps with dropout; ``rules`` by name."""
    module = Net()
    base = linen(module, module.init(jax.random.key(0), np.zeros((1, 4), np.float32)))
    model = heads.classifier(base, 3, key=jax.random.key(1), on="features", width=16)
    step = make_step(Classify(), optax.adam(1e-2), mesh=sharding.make_mesh(devices), sharding=RULES[rules])
    state = step.init(model, jax.random.key(2))
    rows = {
        "image": np.arange(16, dtype=np.float32).reshape(4, 4) / 8,
        "label": np.array([0, 1, 2, 0], np.int32),
    }
    share = len(rows["label"]) // jax.process_count()
    own = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    batch = sharding.global_batch({name: field[own] for name, field in rows.items()}, step.mesh)
    found = []
    for _ in range(3):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, __file__, str(port)]
    environment = {**os.environ, "XLA_FLAGS": ""}  # a device each
    both = [
        subprocess.Popen([*words, str(i)], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(2)
    ]
    found = [json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for child in both]
    assert found[0] == found[1]
    for rules in RULES:
        np.testing.assert_allclose(found[0][rules], losses(jax.devices()[:2], rules), rtol=1e-5)


if __name__ == "__main__":
    port, index = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    print(json.dumps({rules: losses(jax.devices(), rules) for rules in RULES}))
