"""A method as a recipe: a model, a loss, batches, labels and a gradient, which one function trains.

Studies that compare methods build a ``Recipe`` for each; ``train`` is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jaxtyping import PyTree

from jtl.data.batches.loader import Steps, loader
from jtl.model import Model
from jtl.train import Fitted, Step, adamw, backprop, fit, make_step, schedule
from jtl.train.loop import StepFunction
from jtl.train.step import Gradient, LossFunction


@dataclass(frozen=True)
class Recipe:
    """What a method trains, and how.

    Attributes:
        model: before the first update.
        loss: what it minimises.
        batches: what it reads, by step.
        labels: which parameters train, and how fast; None for all of them.
        gradient: how the gradient is taken.
        finish: from what was trained to what is validated and tested.
    """

    model: Model
    loss: LossFunction
    batches: Steps
    labels: PyTree | None = None
    gradient: Gradient = backprop
    finish: Callable[[Model], Model] = lambda model: model


def train(
    recipe: Recipe,
    *,
    steps: int,
    rate: float,
    seed: int | jax.Array,
    validate: Callable[[Model], dict[str, float]] | None = None,
    weight_decay: float = 0.01,
    decay: Literal["linear", "cosine", "constant"] = "linear",
    b2: float = 0.999,
    around: Callable[[Step], StepFunction] = lambda step: step,
    **fit_options: Any,
) -> Fitted:
    """The fitted recipe: ``make_step``, ``init`` and ``fit`` by AdamW with the usual schedule, then ``finish``.

    Args:
        recipe: what to train.
        steps: updates.
        rate: peak learning rate.
        seed: of the run's random key, or that key.
        validate: metrics of a finished model.
        weight_decay: AdamW's.
        decay: of the rate after its warmup.
        b2: AdamW's decay of the second moment.
        around: what ``fit`` calls in place of the compiled step, such as one that first makes its batch.
        **fit_options: of ``jtl.train.fit``: ``validate_every``, ``metric``, ``checkpoints``, ``resume``, ...
    """
    optimizer = adamw(schedule(rate, steps, decay=decay), weight_decay=weight_decay, b2=b2)
    step = make_step(recipe.loss, optimizer, recipe.labels, gradient=recipe.gradient)
    key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    fitted = fit(
        around(step),
        step.init(recipe.model, key),
        loader(recipe.batches),
        steps=steps,
        validate=None if validate is None else lambda model: validate(recipe.finish(model)),
        **fit_options,
    )
    return fitted._replace(model=recipe.finish(fitted.model))
