"""Timing of train steps, and ratios of times round by round."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jtl.report import estimate
from jtl.report.result import Estimate, Row
from jtl.train import Step, TrainState


def timed_updates(step: Step, state: TrainState, batches: Iterable[Any]) -> tuple[TrainState, float]:
    """The state after an update on each of ``batches``, and the seconds that they took."""
    began = time.monotonic()
    for batch in batches:
        state, _ = step(state, batch)
    jax.block_until_ready(state.trained)
    return state, time.monotonic() - began


def ratio(rows: Sequence[Row], metric: str, peer: str, own: str = "jtl") -> Estimate:
    """The estimate of a metric of the arm ``peer`` over that of ``own``, row by row: above 1, ``own`` needs less."""
    ours, theirs = ([row[metric] for row in rows if row["arm"] == arm] for arm in (own, peer))
    return estimate([b / a for a, b in zip(ours, theirs, strict=True)])
