"""``fit`` is the plain loop, and what it adds: validation, patience, the best model, divergence, Ctrl-C."""

import signal

import digits_task as task
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import sharding, tree
from jtl.prefetch import prefetch
from jtl.tasks import classify
from jtl.train import Checkpoints, Diverged, Interrupted, fit, loop, make_step

STEPS = 12


@pytest.fixture(scope="module")
def run():
    return task.step()


@pytest.fixture(scope="module")
def train():
    return task.data()[0]


def init(run):
    return run.init(task.model(), jax.random.key(1))


def equal(one, other):
    a, b = tree.flatten(one), tree.flatten(other)
    return a.keys() == b.keys() and all((a[p] == b[p]).all() for p in a)


def scripted(values):
    """A validation that gives ``values`` in turn and remembers the parameters that it saw."""
    seen = []

    def validate(model):
        seen.append(jax.tree.map(np.array, model.variables))
        return {"accuracy": values[len(seen) - 1], "other": 0.0}

    return validate, seen


def test_fit_is_the_plain_loop(run, train):
    state, losses = init(run), []
    batches = iter(task.loader(train))
    for _ in range(STEPS):
        state, metrics = run(state, next(batches))
        losses.append(float(metrics["loss"]))

    fitted = fit(run, init(run), task.loader(train), steps=STEPS, progress=False)
    assert equal(fitted.state.trained, state.trained) and equal(fitted.state.opt_state, state.opt_state)
    assert equal(fitted.model.variables, state.model.variables)
    assert [row["loss"] for row in fitted.history] == losses
    assert [row["step"] for row in fitted.history] == list(range(1, STEPS + 1))
    assert [row["examples"] for row in fitted.history] == [32 * n for n in range(1, STEPS + 1)]
    seconds = [row["seconds"] for row in fitted.history]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert {"accuracy", "gradient_norm"} <= fitted.history[0].keys() and fitted.best is None
    kept = jax.tree.map(np.array, fitted.model.variables)
    run(fitted.state, next(batches))
    assert equal(fitted.model.variables, kept)


def test_a_row_holds_the_means_since_the_row_before(run, train, monkeypatch):
    every = fit(run, init(run), task.loader(train), steps=STEPS, progress=False).history
    monkeypatch.setattr(loop, "ROWS", 3)
    rows = fit(run, init(run), task.loader(train), steps=STEPS, progress=False).history
    assert [row["step"] for row in rows] == [4, 8, 12]
    expected = np.mean([row["loss"] for row in every[4:8]])
    assert rows[1]["loss"] == pytest.approx(expected, rel=1e-6)


def test_it_learns(run, train):
    fitted = fit(run, init(run), task.loader(train), steps=task.STEPS, validate=task.validate, progress=False)
    assert fitted.history[-1]["validation_accuracy"] > 0.6
    assert task.validate(fitted.model)["accuracy"] == fitted.best["value"] > 0.6


def test_the_best_model_is_kept_and_patience_stops(run, train):
    validate, seen = scripted([0.5, 0.9, 0.7, np.nan, 0.9, 1.0])
    fitted = fit(
        run, init(run), task.loader(train), steps=100, validate=validate, validate_every=2, patience=3,
        progress=False,
    )  # fmt: skip
    assert int(fitted.state.step) == 10 and len(seen) == 5
    assert fitted.best == {"step": 4, "value": 0.9}
    assert equal(fitted.model.variables, seen[1]) and not equal(fitted.model.variables, seen[4])
    assert equal(fitted.state.model.variables, seen[4])
    assert [row["validation_accuracy"] for row in fitted.history if "validation_other" in row][:3] == [
        0.5,
        0.9,
        0.7,
    ]


def test_less_can_be_better_and_the_last_step_is_validated(run, train):
    validate, seen = scripted([0.5, 0.2, 0.3])
    fitted = fit(
        run, init(run), task.loader(train), steps=5, validate=validate, validate_every=2, mode="min",
        progress=False,
    )  # fmt: skip
    assert fitted.best == {"step": 4, "value": 0.2} and len(seen) == 3
    with pytest.raises(
        KeyError, match=r"validate gives no 'f1': set metric= to one of \['accuracy', 'other'\]"
    ):
        fit(run, init(run), task.loader(train), steps=2, validate=scripted([0.5, 0.5])[0], metric="f1")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_resumes(name, run, train, tmp_path):
    """Interrupted after the best validation: the best model and patience outlive the resumption."""
    number, values = getattr(signal, name), [0.3, 0.9, 0.5, 0.6, 0.7, 0.8]
    validate, whole_seen = scripted(values)
    whole = fit(
        run, init(run), task.loader(train), steps=STEPS, validate=validate, validate_every=2, progress=False
    )

    calls = []

    def interrupting(model):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(number)
        return {"accuracy": values[len(calls) - 1], "other": 0.0}

    options = {"steps": STEPS, "validate": interrupting, "validate_every": 2, "progress": False}
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    usual = [signal.getsignal(one) for one in signals]
    with pytest.raises(
        Interrupted, match="stopped after step 7 and saved .*step_00000007; .*resume=True"
    ) as raised:
        fit(run, init(run), task.loader(train), checkpoints=Checkpoints(tmp_path), **options)
    assert raised.value.signal == number
    assert [signal.getsignal(one) for one in signals] == usual

    fitted = fit(
        run, init(run), task.loader(train), checkpoints=Checkpoints(tmp_path), resume=True, **options
    )
    assert equal(fitted.state.trained, whole.state.trained)
    assert equal(fitted.state.opt_state, whole.state.opt_state)
    assert equal(fitted.model.variables, whole_seen[1]) and fitted.best == {"step": 4, "value": 0.9}
    times = {"seconds", "examples"}
    one, other = (
        [{k: v for k, v in r.items() if k not in times} for r in f.history] for f in (fitted, whole)
    )
    assert one == other

    # A finished run has nothing left to do, and gives the same result again.
    again = fit(run, init(run), task.loader(train), checkpoints=Checkpoints(tmp_path), resume=True, **options)
    assert len(calls) == 6
    assert equal(again.state.trained, whole.state.trained) and again.history == fitted.history
    assert equal(again.model.variables, whole_seen[1])


def test_ctrl_c_without_a_folder_says_so(run, train):
    def validate(model):
        signal.raise_signal(signal.SIGINT)
        return {"accuracy": 0.0}

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3; nothing was saved"):
        fit(run, init(run), task.loader(train), steps=9, validate=validate, validate_every=2, progress=False)


def test_a_hang_up_that_is_ignored_stays_ignored(run, train):
    """As under nohup: the run goes on to its end."""

    def validate(model):
        signal.raise_signal(signal.SIGHUP)
        return {"accuracy": 0.0}

    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fitted = fit(
            run, init(run), task.loader(train), steps=3, validate=validate, validate_every=2, progress=False
        )
        assert int(fitted.state.step) == 3 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


class Poisoned:
    """The digits with a NaN pixel in every image from batch ``at`` (from 1) on; resumable."""

    def __init__(self, fields, at):
        self.inner, self.at, self.count = iter(task.loader(fields)), at, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        batch = next(self.inner)
        return batch | {"image": batch["image"] * np.nan} if self.count >= self.at else batch

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


@pytest.mark.parametrize("at, good", [(6, 3), (8, 6)])
def test_a_loss_that_is_not_finite_stops_and_is_never_saved(run, train, tmp_path, at, good):
    checkpoints = Checkpoints(tmp_path)
    message = f"the loss of step {at} is nan; the last good checkpoint is .*step_{good:08d}"
    with pytest.raises(Diverged, match=message):
        fit(
            run, init(run), Poisoned(train, at), steps=30, checkpoints=checkpoints, save_every=3,
            progress=False,
        )  # fmt: skip
    assert checkpoints.steps()[-1] == good
    assert int(checkpoints.restore(init(run)).state.step) == good


def test_parameters_that_are_not_finite_after_a_finite_loss_are_never_saved(train, tmp_path):
    rate = lambda count: jnp.where(count == 5, jnp.nan, 1e-3)  # noqa: E731
    broken = make_step(classify.Classify(stats="batch"), optax.sgd(rate))
    checkpoints = Checkpoints(tmp_path)
    options = {"steps": 6, "progress": False}
    with pytest.raises(
        Diverged, match="after step 6 the leaves .*first/bias.* are not finite; .*step_00000003"
    ):
        fit(broken, init(broken), task.loader(train), checkpoints=checkpoints, save_every=3, **options)
    assert checkpoints.steps() == [3]
    with pytest.raises(Diverged, match="there is no checkpoint"):
        fit(broken, init(broken), task.loader(train), **options)


def test_on_a_mesh_a_resumed_run_has_the_same_bits(train, tmp_path):
    sharded = task.step(mesh=sharding.make_mesh(), sharding=sharding.FULLY_SHARDED)
    options = {"validate_every": 4, "progress": False}
    whole = fit(sharded, init(sharded), task.loader(train), steps=8, **options)
    fit(sharded, init(sharded), task.loader(train), steps=4, checkpoints=Checkpoints(tmp_path), **options)
    resumed = fit(
        sharded, init(sharded), task.loader(train), steps=8, checkpoints=Checkpoints(tmp_path), resume=True,
        **options,
    )  # fmt: skip
    assert equal(resumed.state.trained, whole.state.trained)
    assert len(resumed.state.trained["first"]["kernel"].sharding.device_set) == 8


def test_bad_arguments_are_errors_before_training(run, train, tmp_path):
    untouched = init(run)
    cases = [
        ({"steps": 0}, "steps=0"),
        ({"steps": 5, "validate_every": 0}, "validate_every=0"),
        ({"steps": 5, "patience": 2}, "needs validate"),
        ({"steps": 5, "resume": True}, "needs checkpoints"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(run, untouched, task.loader(train), **options)
    with pytest.raises(ValueError, match="list_iterator has no get_state and set_state"):
        fit(run, untouched, [], steps=5, checkpoints=Checkpoints(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write checkpoints"):
        fit(run, untouched, task.loader(train), steps=5, checkpoints=Checkpoints(tmp_path / "file"))


def test_a_loader_that_ends_early_is_an_error(run, train):
    three = [batch for batch, _ in zip(task.loader(train), range(3), strict=False)]
    with pytest.raises(ValueError, match="the loader ended after 3 of 5 steps"):
        fit(run, init(run), three, steps=5, progress=False)
    assert int(fit(run, init(run), three, steps=3, progress=False).state.step) == 3


def test_lines_where_there_is_no_terminal(run, train, capsys):
    fit(run, init(run), task.loader(train), steps=4, validate=task.validate, validate_every=4)
    out, err = capsys.readouterr()
    assert out.startswith("step 4/4  loss ") and "examples/s  0 s left" in out
    assert err.startswith("step 4: accuracy 0.")


def test_tensorboard_events(run, train, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    fitted = fit(
        run, init(run), task.loader(train), steps=4, validate=task.validate, validate_every=2, log=tmp_path,
        progress=False,
    )  # fmt: skip
    (file,) = tmp_path.glob("events.*")
    content, values = file.read_bytes(), {}
    while content:  # a record: length (8 bytes), checksum (4), data, checksum (4)
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        content = content[16 + length :]
    for row in fitted.history:
        assert values["train/loss", row["step"]] == np.float32(row["loss"])
    assert values["validation/accuracy", 4] == np.float32(fitted.history[-1]["validation_accuracy"])
    assert ("validation/accuracy", 3) not in values


def test_prefetch_reads_ahead_and_keeps_each_batchs_own_state(train):
    direct, ahead = iter(task.loader(train)), prefetch(task.loader(train), depth=3)
    for _ in range(5):
        expected, ready = next(direct), next(ahead)
        assert equal(ready.batch, expected) and ready.examples == 32
        assert ready.state == loop.json.dumps(direct.get_state())
    ahead.close()
    third = task.evaluation_batches(task.data()[1])[-1]
    assert [ready.examples for ready in prefetch([third])] == [297 - 4 * 64]


def test_prefetch_passes_a_loaders_error_on():
    def loader():
        yield {"x": np.zeros(2)}
        raise OSError("the disk is gone")

    ahead = prefetch(loader())
    assert next(ahead).examples == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
