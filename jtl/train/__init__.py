"""Training: the step, the loop around it, checkpoints, meshes and reports."""

from jtl.train.checkpoint import CheckpointError, Checkpoints, Saved
from jtl.train.loop import Diverged, Fitted, Interrupted, fit
from jtl.train.predict import outputs, predict
from jtl.train.schedule import adamw, schedule
from jtl.train.step import LEAN_ON_CPU, Step, TrainState, accumulate, backprop, make_step
from jtl.train.sweep import Sweep, run_of, sweep

__all__ = [
    "LEAN_ON_CPU", "CheckpointError", "Checkpoints", "Diverged", "Fitted", "Interrupted", "Saved", "Step", "Sweep",
    "TrainState", "accumulate", "adamw", "backprop", "fit", "make_step", "outputs", "predict", "run_of", "schedule",
    "sweep",
]  # fmt: skip
