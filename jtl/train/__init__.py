"""Training: the compiled train step, the training loop, learning-rate schedules, sweeps and checkpoints."""

from jtl.train.checkpoint import CheckpointError, Checkpoints, Saved
from jtl.train.loop import Diverged, Fitted, Interrupted, fit
from jtl.train.schedule import adamw, schedule
from jtl.train.step import Step, TrainState, accumulate, backprop, make_step
from jtl.train.sweep import Sweep, run_of, sweep

__all__ = [
    "CheckpointError", "Checkpoints", "Diverged", "Fitted", "Interrupted", "Saved", "Step", "Sweep",
    "TrainState", "accumulate", "adamw", "backprop", "fit", "make_step", "run_of", "schedule",
    "sweep",
]  # fmt: skip
