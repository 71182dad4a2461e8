"""What a checkpoint holds, what it refuses, and how it is found out when it is damaged."""

import json
import logging
import os

import digits_task as task
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import sharding, tree
from jtl.train import CheckpointError, Checkpoints, make_step
from jtl.train.checkpoint import fingerprint
from jtl.train.step import TrainState

PROGRESS = {"history": [{"step": 1, "loss": 0.1}], "best": None}


def make_state(step: int = 3, scale: float = 1.0, width: int = 4, frozen: float = 7.0) -> TrainState:
    """A state with every kind of leaf."""
    base = task.model()
    trained = {
        "body": None,
        "head": {"kernel": jnp.arange(8.0).reshape(2, width) * scale, "low": jnp.ones(3, jnp.bfloat16) / 3},
    }
    return TrainState(
        trained=trained,
        collections={"batch_stats": {"mean": jnp.full(2, scale)}},
        opt_state=optax.adam(1e-3).init(trained),
        step=jnp.array(step, jnp.int32),
        key=jax.random.key(5),
        frozen=base.replace(variables={"params": {"body": jnp.full((2, 2), frozen), "head": None}}),
    )


def save(checkpoints: Checkpoints, step: int, **changes):
    state = make_state(step, scale=float(step), **changes)
    return checkpoints.save(state, best=None, loader={"next_index": step}, progress=PROGRESS)


def plain(leaf) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def equal(one, other) -> bool:
    a, b = ({path: plain(leaf) for path, leaf in tree.flatten(t).items()} for t in (one, other))
    return a.keys() == b.keys() and all(a[p].dtype == b[p].dtype and (a[p] == b[p]).all() for p in a)


def test_round_trip_of_everything_but_the_frozen_part(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    state, best = make_state(3, scale=2.0), make_state(1, scale=3.0)
    best = {"trained": best.trained, "collections": best.collections}
    path = checkpoints.save(state, best=best, loader={"next_index": 17, "text": "ü"}, progress=PROGRESS)
    assert path == tmp_path / "run" / "step_00000003"

    saved = Checkpoints(tmp_path / "run").open(make_state(0), resume=True)
    assert equal(saved.state.replace(frozen=None), state.replace(frozen=None))
    assert jax.random.key_impl(saved.state.key) == jax.random.key_impl(state.key)
    assert equal(saved.best, best)
    assert (saved.loader, saved.progress) == ({"next_index": 17, "text": "ü"}, PROGRESS)
    assert not any(
        name.startswith("frozen") for name in json.loads((path / "run.json").read_text())["arrays"]
    )


def test_another_frozen_part_is_refused_by_leaf(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    with pytest.raises(
        CheckpointError, match=r"frozen part differs in 1 leaves: body: float32\[2,2\] \w{16}"
    ):
        Checkpoints(tmp_path).restore(make_state(frozen=7.0000005))


def test_another_trained_structure_is_refused_by_leaf(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    other = make_state()
    other.trained["head"]["extra"] = jnp.zeros(1)
    with pytest.raises(CheckpointError, match="1 leaves: trained/head/extra: absent there, float32.1. here"):
        checkpoints.restore(other)
    other = make_state().replace(collections={"batch_stats": {"mean": jnp.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"mean: float32\[2\] there, float32\[3\] here"):
        checkpoints.restore(other)


def test_fingerprint_sees_one_bit_the_shape_and_the_dtype():
    x = np.ones((2, 3), np.float32)
    changed = x.copy()
    changed[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    alike = [x, changed, x.T, x.astype(np.float16), x.view(np.int32)]
    assert len({fingerprint({"a": jnp.asarray(one)})["a"] for one in alike}) == len(alike)
    assert fingerprint({"a": jnp.asarray(x)}) == fingerprint({"a": x})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def biggest(folder):
    return max((p for p in (folder / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (lambda folder: flip(biggest(folder)), "SHA-256"),
        (lambda folder: os.truncate(biggest(folder), 10), "SHA-256"),
        (lambda folder: biggest(folder).unlink(), "is missing"),
        (lambda folder: flip(folder / "run.json"), "run.json does not"),
        (lambda folder: flip(folder / "loader-0.json"), "loader-0.json does not"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda folder: os.truncate(folder / "manifest.json", 20), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "lists no run.json"),
    ],
    ids=["bit", "truncated", "deleted", "run", "loader", "no manifest", "half manifest", "empty manifest"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, harm, complaint):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    newest = save(checkpoints, 20)
    harm(newest)
    with caplog.at_level(logging.WARNING):
        saved = checkpoints.open(make_state(), resume=True)
    assert int(saved.state.step) == 10 and saved.loader == {"next_index": 10}
    assert str(newest) in caplog.text and complaint in caplog.text
    # The next save at the same step takes its place.
    save(checkpoints, 20)
    assert int(checkpoints.restore(make_state()).state.step) == 20


def test_nothing_usable_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        flip(save(checkpoints, step) / "run.json")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is usable \(steps \[10, 20\]"):
        checkpoints.open(make_state(), resume=True)


def test_the_last_ones_are_kept_and_superseded_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        save(checkpoints, step)
    assert checkpoints.steps() == [3, 10]
    save(checkpoints, 5)  # as after falling back from a corrupted 10
    assert checkpoints.steps() == [3, 5]
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000005"]


def test_open(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "new" / "deep")
    assert checkpoints.open(make_state(), resume=False) is None
    with caplog.at_level(logging.WARNING):
        assert checkpoints.open(make_state(), resume=True) is None
    assert "no checkpoint in" in caplog.text
    save(checkpoints, 4)
    with pytest.raises(CheckpointError, match=r"holds checkpoints already \(steps \[4\]\): resume"):
        checkpoints.open(make_state(), resume=False)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to .*file"):
        Checkpoints(tmp_path / "file" / "run").open(make_state(), resume=False)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        return  # root may write anywhere
    with pytest.raises(CheckpointError, match="cannot write checkpoints to .*locked"):
        Checkpoints(locked).open(make_state(), resume=False)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"\['head/kernel'\] are not finite"):
        checkpoints.save(make_state(3, scale=np.inf), best=None, loader=None, progress={})
    assert os.listdir(tmp_path) == []


def test_arrays_come_back_on_the_mesh_of_the_template(tmp_path):
    devices = sharding.make_mesh()
    sharded = task.step(mesh=devices, sharding=sharding.FULLY_SHARDED)
    state = sharded.init(task.model(), jax.random.key(1))
    assert len(state.trained["first"]["kernel"].sharding.device_set) == 8
    state, _ = sharded(state, sharding.global_batch(task.evaluation_batches(task.data()[1])[0], devices))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, best=None, loader=None, progress={})

    template = sharded.init(task.model(), jax.random.key(2))
    restored = checkpoints.restore(template).state
    assert equal(restored.replace(frozen=None), state.replace(frozen=None))
    kernels = [x for path, x in tree.flatten(restored).items() if path.endswith("first/kernel")]
    assert len(kernels) == 3  # the parameter and Adam's two moments
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in kernels)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True)
    assert all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)
    # A run may go on with other devices.
    single = checkpoints.restore(task.step().init(task.model(), jax.random.key(2))).state
    assert equal(single.replace(frozen=None), state.replace(frozen=None))
    assert len(single.trained["first"]["kernel"].sharding.device_set) == 1


def test_the_step_runs_on_from_a_restored_state(tmp_path):
    """Restored arrays are as good as new ones: donation included, and the same bits follow."""
    run = make_step(task.step().loss, optax.adam(1e-3))
    batch = task.evaluation_batches(task.data()[1])[0]
    state, _ = run(run.init(task.model(), jax.random.key(1)), batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, best=None, loader=None, progress={})
    restored = checkpoints.restore(run.init(task.model(), jax.random.key(9))).state
    assert equal(run(restored, batch)[0].replace(frozen=None), run(state, batch)[0].replace(frozen=None))
