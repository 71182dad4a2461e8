"""Learning-rate schedules in fractions of the run, and the standard AdamW for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """An optax schedule that knows its length: see ``schedule``."""

    peak: Any
    steps: Any
    warmup: float
    decay: Literal["linear", "cosine", "constant"]
    end: float

    def __call__(self, step: Any) -> Float[Array, ""]:
        """Return the rate of update number ``step``, counted from 0."""
        rising = jnp.round(self.warmup * self.steps)
        done = jnp.clip((step - rising) / jnp.maximum(self.steps - rising, 1), 0.0, 1.0)
        share = {
            "linear": 1 - done,
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
            "constant": jnp.ones_like(done),
        }
        after = self.end + (self.peak - self.end) * share[self.decay]
        return jnp.where(step < rising, self.peak * step / jnp.maximum(rising, 1), after)


def schedule(
    peak: float,
    steps: int,
    *,
    warmup: float = 0.1,
    decay: Literal["linear", "cosine", "constant"] = "linear",
    end: float = 0.0,
) -> Schedule:
    """Return a learning rate that rises linearly from 0 to ``peak``, then decays to ``end`` at ``steps``.

    During the first ``w = round(warmup * steps)`` steps, step t (from 0) has the rate ``peak * t / w``, as in BERT and
    Hugging Face's Trainer. Cosine is half a period (Loshchilov and Hutter 2017, eq. 5, without restarts).

    Args:
        peak: the highest rate.
        steps: number of updates of the whole run.
        warmup: fraction of ``steps`` for the warm-up, in [0, 1).
        decay: shape of the decay after the warm-up.
        end: the final rate; ``constant`` ignores it.

    Raises:
        ValueError: ``steps``, ``warmup`` or ``decay`` is invalid.

    >>> rate = schedule(1.0, 10, warmup=0.2)
    >>> [round(float(rate(t)), 3) for t in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if steps < 1 or not 0 <= warmup < 1:
        raise InputError(f"need steps >= 1 and 0 <= warmup < 1, got steps={steps}, warmup={warmup}")
    if decay not in ("linear", "cosine", "constant"):
        raise InputError(f"decay must be 'linear', 'cosine' or 'constant', got {decay!r}")
    return Schedule(peak, steps, warmup, decay, end)


def adamw(
    rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.01,
    decay: tree.Rules | None = None,
    clip: float | None = 1.0,
    **settings: Any,
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter 2019, algorithm 2) after clipping by the global norm.

    With a rate from ``schedule``, its peak and length are part of the optimiser's state. Runs of other lengths and
    rates then compile to the same program and hit JAX's compilation cache. Checkpoints hold them too: a resumed run
    keeps the peak and length it began with.

    Args:
        rate: a constant learning rate or a schedule.
        weight_decay: strength of the decoupled decay; it is multiplied by the rate.
        decay: rules from paths to whether a leaf decays. By default all leaves do, except those named ``bias`` or
            ``scale``.
        clip: the largest global norm of the gradient; None for no clipping.
        **settings: ``b1``, ``b2``, ``eps`` and others of ``optax.adamw``.
    """

    def build(rate: float | optax.Schedule) -> optax.GradientTransformation:
        mask = lambda params: decays(params, decay)  # noqa: E731
        optimizer = optax.adamw(rate, weight_decay=weight_decay, mask=mask, **settings)
        return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)

    if not isinstance(rate, Schedule):
        return build(rate)
    injected = optax.inject_hyperparams(lambda peak, steps: build(replace(rate, peak=peak, steps=steps)))
    return injected(peak=float(rate.peak), steps=float(rate.steps))


def decays(params: PyTree, rules: tree.Rules | None = None) -> PyTree:
    """Return which leaves ``adamw`` decays.

    >>> decays({"dense": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}})
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    if rules is not None:
        return tree.assign(rules, params)
    # Not a rule list: a run may train biases alone, or none, and a rule that meets no leaf raises.
    return tree.map_with_path(lambda path, _: path.split("/")[-1] not in ("bias", "scale"), params)
