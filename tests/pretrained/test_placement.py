"""Loading onto devices: what lies where, and how much memory of the host it takes."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import jtl
from jtl import tree
from jtl.models import ARCHITECTURES
from jtl.pretrained import load, load_with_report, save, scratch
from jtl.pretrained.load import expected
from jtl.sharding import FULLY_SHARDED, REPLICATE, REPLICATED, SHARD, layout, make_mesh
from jtl.tasks import CausalLM
from jtl.train import make_step

TINY = {"model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # fmt: skip
LARGE = TINY | {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14,
                "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return save(scratch(folder, key=jax.random.key(0)), folder / "model")


RULES = {"replicated": REPLICATED, "sharded": FULLY_SHARDED,
         "mixed": ((".*/mlp/.*", SHARD), (".*word.*", REPLICATE), (".*", SHARD))}  # fmt: skip


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_lie_where_the_rules_say_and_are_the_same(tiny, rules, dtype):
    mesh, one = make_mesh(), load(tiny, dtype=dtype)
    found = load(tiny, dtype=dtype, mesh=mesh, sharding=RULES[rules])
    values = tree.flatten(tree.assign(RULES[rules], found.params))
    for path, leaf in tree.flatten(found.params).items():
        assert leaf.sharding == layout(leaf.shape, values[path], mesh), path
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, tree.flatten(one.params)[path])
    gate = found.params["decoder"]["layer_0"]["mlp"]["gate"]["kernel"]  # (16, 20): 8 devices divide 16 alone
    assert gate.addressable_shards[0].data.shape == ((16, 20) if rules == "replicated" else (2, 20))


def test_a_step_leaves_them_there(tiny):
    mesh = make_mesh()
    found = load(tiny, mesh=mesh, sharding=FULLY_SHARDED)
    step = make_step(CausalLM(), optax.sgd(0.1), mesh=mesh, sharding=FULLY_SHARDED)
    state = step.init(found, jax.random.key(0))
    for path, leaf in tree.flatten(found.params).items():
        put = tree.flatten(state.model.params)[path]
        assert put.sharding == leaf.sharding, path


def test_statistics_are_on_every_device_and_new_leaves_on_the_mesh(tmp_path):
    mesh = make_mesh()
    found = load("efficientnet-lite0", mesh=mesh, sharding=FULLY_SHARDED)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found.variables["batch_stats"]))
    assert found.params["head"]["out"]["kernel"].addressable_shards[0].data.shape == (160, 1000)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": False}))
    whole = {key: np.asarray(value) for key, value in _tensors(TINY, np.float32).items()}
    save_file(whole, tmp_path / "model.safetensors")
    found, report = load_with_report(tmp_path, key=jax.random.key(0), mesh=mesh, sharding=FULLY_SHARDED)
    assert report.new == ("params/lm_head/kernel",)
    assert found.params["lm_head"]["kernel"].addressable_shards[0].data.shape == (16, 3)


def test_rules_that_do_not_fit(tiny):
    with pytest.raises(tree.RuleError, match="'.*/mpl/.*' meets no leaf"):
        load(tiny, mesh=make_mesh(), sharding=((".*/mpl/.*", SHARD), (".*", REPLICATE)))


def test_a_changed_file_does_not_change_the_model(tiny, tmp_path):
    model = load(tiny)
    before = [np.array(leaf) for leaf in jax.tree.leaves(model.variables)]
    file = tiny / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(bytes(len(content)))  # in place: the mapping of an open file would show it
        assert all(map(np.array_equal, before, jax.tree.leaves(model.variables)))
    finally:
        file.write_bytes(content)


# --- memory ------------------------------------------------------------------------------------------


def _tensors(settings, dtype):
    """Random tensors of a Llama by their names in a file."""
    architecture = ARCHITECTURES["llama"]
    config = architecture.config.from_hf(settings)
    shapes, rng = expected(architecture.module(config), architecture, config), np.random.default_rng(0)
    return {
        tensor.key: tensor.layout.to_file(rng.random(shapes[path].shape, np.float32)).astype(dtype, order="C")
        for path, tensor in architecture.tensors(config).items()
    }


PROGRAM = """
import json, re, sys, time
import jax
import jax.numpy as jnp
import jtl
from jtl.sharding import FULLY_SHARDED, make_mesh

folder, tiny, dtype, sharded = sys.argv[1:]
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

places = {"mesh": make_mesh(), "sharding": FULLY_SHARDED} if sharded == "sharded" else {}
to = None if dtype == "kept" else jnp.dtype(dtype)
jtl.load(tiny, dtype=to, **places)  # what is imported and compiled for the first model
before, began = peak(), time.monotonic()
model = jtl.load(folder, dtype=to, **places)
seconds = time.monotonic() - began
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables))
print(json.dumps({"ratio": (peak() - before) / size, "size": size, "seconds": seconds}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak as Linux tells it")
@pytest.mark.parametrize(
    ("stored", "dtype", "sharded"),
    [
        (np.float32, "float32", "one"),
        (ml_dtypes.bfloat16, "kept", "one"),
        (np.float16, "float32", "sharded"),
    ],
)
def test_the_host_holds_the_model_once(stored, dtype, sharded, tiny, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    save_file(_tensors(LARGE, stored), tmp_path / "model.safetensors")
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tiny), dtype, sharded]
    run = subprocess.run(words, capture_output=True, text=True, cwd=Path(jtl.__file__).parents[1])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print(found)
    assert found["size"] > (1e8 if dtype == "kept" else 2e8)
    assert 0.9 < found["ratio"] <= 1.2, found
