"""Training: the step, the loop around it, checkpoints, meshes and reports."""

from jtl.train.checkpoint import CheckpointError, Checkpoints, Saved
from jtl.train.loop import Diverged, Fitted, Interrupted, fit
from jtl.train.predict import outputs, predict
from jtl.train.schedule import adamw, schedule
from jtl.train.step import Step, TrainState, accumulate, backprop, make_step

__all__ = [
    "CheckpointError", "Checkpoints", "Diverged", "Fitted", "Interrupted", "Saved", "Step", "TrainState",
    "accumulate", "adamw", "backprop", "fit", "make_step", "outputs", "predict", "schedule",
]  # fmt: skip
