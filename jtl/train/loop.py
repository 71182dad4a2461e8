"""``fit``: the training loop, with validation, early stopping, checkpoints and resumption."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtl.errors import Diverged, InputError, MissingError
from jtl.model import Model
from jtl.prefetch import prefetch
from jtl.train.checkpoint import Checkpoints, not_finite
from jtl.train.progress import Display
from jtl.train.step import TrainState

StepFunction = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
Validate = Callable[[Model], dict[str, float]]
ROWS = 200
Row = dict[str, int | float]


# Ctrl-C, the end of a job on a cluster, a closed terminal (which Windows does not have).
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: the running step was finished, and a checkpoint written if there is a folder for it.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Fitted(NamedTuple):
    """The result of a run.

    Attributes:
        state: the last train state.
        model: the model of the best validation; without validation, the last one.
        history: one dict for each row of the learning curve: ``step``, ``seconds`` and ``examples`` so far, the means
            of ``loss`` and the step's other metrics since the previous row, and validation metrics such as
            ``validation_accuracy`` where it was validated.
        best: ``{"step": ..., "value": ...}`` of the best validation, or None.
    """

    state: TrainState
    model: Model
    history: list[Row]
    best: Row | None


@dataclass
class Progress:
    """The loop's own state beside the arrays; stored as JSON in every checkpoint."""

    history: list[Row] = field(default_factory=list)
    best: Row | None = None
    worse: int = 0
    seconds: float = 0.0
    examples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, step: int, metrics: dict[str, float], examples: int, *, close: bool) -> None:
        """Count one step; ``close`` ends a row of the history with the means since the previous row."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()}
        self.count += 1
        self.examples += examples
        if close:
            means = {name: total / self.count for name, total in self.sums.items()}
            self.history.append({"step": step, **means, "seconds": self.seconds, "examples": self.examples})
            self.sums, self.count = {}, 0

    def judge(self, step: int, found: dict[str, float], metric: str, mode: str) -> bool:
        """Record a validation and return whether it is the best so far. NaN never is."""
        self.history[-1] |= {f"validation_{name}": value for name, value in found.items()}
        value, sign = found[metric], 1 if mode == "max" else -1
        better = not math.isnan(value) and (self.best is None or sign * value > sign * self.best["value"])
        self.best, self.worse = ({"step": step, "value": value}, 0) if better else (self.best, self.worse + 1)
        return better


def fit(
    step: StepFunction,
    state: TrainState,
    loader: Iterable[Any],
    *,
    steps: int,
    validate: Validate | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    metric: str = "accuracy",
    mode: Literal["max", "min"] = "max",
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    resume: bool = False,
    log: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Fitted:
    """Train until ``state.step`` is ``steps``, or until validation stops improving.

    A run that is killed and resumed ends bit-identical to an uninterrupted one, given the same devices and a
    deterministic backend (on a GPU: ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``).

    Args:
        step: ``(state, batch) -> (state, metrics)``, from ``make_step``.
        state: from ``step.init``. Its arrays are reused: afterwards use the state that ``fit`` returns.
        loader: at least ``steps`` batches, mappings of arrays. To be resumable its iterator needs ``get_state()``,
            which returns JSON, and ``set_state(state)``.
        steps: total number of updates, including those before a resumption.
        validate: deterministic function from the model to metrics by name.
        validate_every: updates between validations; by default a tenth of ``steps``. The last step is validated too.
        patience: stop after this many consecutive validations without improvement over the best.
        metric: the validation metric that decides.
        mode: whether a higher (``"max"``) or lower (``"min"``) metric is better.
        checkpoints: where to save, the best parameters included.
        save_every: updates between checkpoints; by default ``validate_every``. The last step is saved too.
        resume: resume from the newest intact checkpoint, or start afresh if none was ever completed.
        log: a folder for TensorBoard events.
        progress: show a progress bar, or an occasional line if the output is not a terminal.

    Returns:
        The last state, the best model and the learning curve.

    Raises:
        Diverged: the loss or a trained leaf is not finite. The loss is read one step late to keep the devices busy, but
            no checkpoint is ever written with trained leaves that are not finite.
        Interrupted: Ctrl-C; the running step was finished and saved. A second Ctrl-C stops at once.
        CheckpointError: before training, see ``Checkpoints.open``.
        ValueError: the loader ended early, or an argument is invalid.
        KeyError: ``validate`` does not return ``metric``.
    """
    validate_every = max(1, steps // 10) if validate_every is None else validate_every
    save_every = validate_every if save_every is None else save_every
    if min(steps, validate_every, save_every) < 1 or mode not in ("max", "min"):
        raise InputError(
            f"{steps=}, {validate_every=} and {save_every=} must be at least 1, {mode=} max or min"
        )
    if patience is not None and (validate is None or patience < 1):
        raise InputError(f"{patience=} must be at least 1, and needs validate")
    if resume and checkpoints is None:
        raise InputError("resume=True needs checkpoints=")
    iterator = iter(loader)
    if checkpoints is not None and not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        raise InputError(
            f"{type(iterator).__name__} has no get_state and set_state, so its run could not be resumed: "
            "use a loader of jtl.data, or leave checkpoints out"
        )

    memory, best = Progress(), None
    saved = checkpoints.open(state, resume=resume) if checkpoints else None
    if saved is not None:
        state, best, memory = saved.state, saved.best, Progress(**saved.progress)
        iterator.set_state(saved.loader)  # type: ignore[attr-defined]
    number, began = int(state.step), time.monotonic() - memory.seconds
    row_every = max(1, steps // ROWS)

    with ExitStack() as stack:
        events = stack.enter_context(_events(log, number))
        display = stack.enter_context(Display(number, steps, progress and jax.process_index() == 0))
        interrupted = stack.enter_context(_interruptible())
        batches = stack.enter_context(closing(prefetch(iterator, getattr(step, "mesh", None))))
        if saved is not None:
            display.say(f"resumed from {saved.path}")

        def record(done: int, metrics: dict[str, Any], examples: int, close: bool) -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not math.isfinite(values["loss"]):
                raise _diverged(f"the loss of step {done} is {values['loss']}", checkpoints)
            memory.seconds = time.monotonic() - began
            close = close or done % row_every == 0
            memory.add(done, values, examples, close=close)
            display.update(done, values["loss"], memory.examples)
            if close:
                events("train", memory.history[-1], done)

        pending: tuple[int, dict[str, Any], int] | None = None
        ended = number >= steps or (patience is not None and memory.worse >= patience)
        while not ended:
            ready = next(batches, None)
            if ready is None:
                raise InputError(
                    f"the loader ended after {number} of {steps} steps: let it repeat its examples"
                )
            state, metrics = step(state, ready.batch)
            number += 1
            if pending is not None:
                record(*pending, close=False)
            pending = (number, metrics, ready.examples * jax.process_count())

            ended, stop = number == steps, bool(interrupted)
            validating = validate is not None and (ended or number % validate_every == 0)
            saving = checkpoints is not None and number % save_every == 0
            if not (validating or saving or ended or stop):
                continue
            record(*pending, close=validating or ended)
            pending = None
            if broken := not_finite(state.trained):
                raise _diverged(f"after step {number} the leaves {broken[:5]} are not finite", checkpoints)
            if validate is not None and validating:
                found = _validated(validate, state.model, metric)
                if memory.judge(number, found, metric, mode):
                    # A copy, because the next step reuses the state's memory.
                    best = jax.tree.map(
                        jnp.copy, {"trained": state.trained, "collections": state.collections}
                    )
                ended = ended or (patience is not None and memory.worse >= patience)
                events("validation", found, number)
                display.say(f"step {number}: " + "  ".join(f"{n} {v:.4f}" for n, v in found.items()))
            if checkpoints is not None and (saving or ended or stop):
                memory.seconds = time.monotonic() - began
                position = None if ready.state is None else json.loads(ready.state)
                checkpoints.save(state, best=best, loader=position, progress=asdict(memory))
            if stop and not ended:
                raise _interrupted(number, checkpoints, interrupted[0])

    if best is None:
        # A copy, because a caller who trains on lets the next step reuse the state's memory.
        best = jax.tree.map(jnp.copy, {"trained": state.trained, "collections": state.collections})
    model = state.replace(**best).model
    return Fitted(state, model, memory.history, memory.best)


def _validated(validate: Validate, model: Model, metric: str) -> dict[str, float]:
    found = {name: float(value) for name, value in validate(model).items()}
    if metric not in found:
        raise MissingError(f"validate gives no {metric!r}: set metric= to one of {sorted(found)}")
    return found


def _diverged(what: str, checkpoints: Checkpoints | None) -> Diverged:
    where = "there is no checkpoint"
    if checkpoints is not None and (good := checkpoints.steps()):
        where = f"the last good checkpoint is {checkpoints.path(good[-1])}"
    return Diverged(f"{what}; {where}. Lower the learning rate, clip the gradient, or look at the data")


def _interrupted(number: int, checkpoints: Checkpoints | None, by: int) -> Interrupted:
    if checkpoints is None:
        return Interrupted(f"stopped after step {number}; nothing was saved, because no folder was given", by)
    return Interrupted(
        f"stopped after step {number} and saved {checkpoints.path(number)}; "
        "run the same again with resume=True (--resume) to go on",
        by,
    )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield a list that the first Ctrl-C, SIGTERM or SIGHUP enters its number into; a second one acts as usual."""
    asked: list[int] = []
    # One process of several must not stop alone, and only the main thread can receive signals.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        restore()

    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


@contextmanager
def _events(log: str | PathLike[str] | None, start: int) -> Iterator[Callable[..., None]]:
    """Yield a writer of TensorBoard events, ``(group, values, step)``; it does nothing without ``log``."""
    if log is None or jax.process_index() > 0:
        yield lambda group, values, step: None
        return
    from tensorboardX import SummaryWriter

    # Hides what a killed run wrote after its last checkpoint.
    with SummaryWriter(str(log), purge_step=start + 1 if start else None) as writer:

        def write(group: str, values: Row, step: int) -> None:
            for name in values.keys() - {"step"}:
                writer.add_scalar(f"{group}/{name}", values[name], step)

        yield write
