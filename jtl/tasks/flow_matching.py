"""Flow matching: images out of noise, along a velocity that a network has learned.

Lipman et al.: "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747; Liu, Gong and Liu: "Flow
Straight and Fast", 2023, https://arxiv.org/abs/2209.03003. Noise x₀ ~ N(0, I) and an image x₁ are the ends of a line
``x_t = (1 - t) x₀ + t x₁``; the network learns its direction ``x₁ - x₀`` from ``x_t``, t and the class.

It is a technique on the model and a loss: the technique draws noise and time, and gives the body ``x_t``; the loss
compares. So one forward serves every term of a sum, and a batch holds plain images. Images are in about -1 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class Noised:
    """The technique behind ``noised``."""

    times: tuple[float, float] | None
    dropped: float
    none: int
    name: ClassVar[str] = "noised"

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` of noised images while training."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if not mode.train:
                return forward(variables, batch, mode, key)
            if key is None:
                raise InputError("flow matching draws noise and times: pass key=")
            noise_key, time_key, drop_key, below = jax.random.split(key, 4)
            image, label = batch["image"], batch["label"]
            noise = jax.random.normal(noise_key, image.shape, image.dtype)
            if self.times is None:
                time = jax.random.uniform(time_key, label.shape)
            else:
                mean, deviation = self.times
                time = jax.nn.sigmoid(mean + deviation * jax.random.normal(time_key, label.shape))
            dropped = jax.random.uniform(drop_key, label.shape) < self.dropped
            t = time[:, None, None, None].astype(image.dtype)
            new = {
                "image": (1 - t) * noise + t * image,
                "time": time,
                "label": jnp.where(dropped, self.none, label),
            }
            outputs, state = forward(variables, {**batch, **new}, mode, below)
            return {**outputs, "flow": {"target": image - noise, "time": time}}, state

        return run


def noised(
    model: Model,
    *,
    times: tuple[float, float] | None = (0.0, 1.0),
    dropped: float = 0.1,
    none: int | None = None,
) -> Model:
    """``model`` that, while training, reads noised images in place of those of the batch.

    Args:
        model: reads ``image`` (B, H, W, C), ``time`` (B,) and ``label`` (B,), and gives ``velocity`` (B, H, W, C).
        times: t is the sigmoid of a normal number of this mean and deviation (Esser et al. 2024,
            https://arxiv.org/abs/2403.03206, equation 19; a mean below 0 asks for more noise); None: it is uniform.
        dropped: share of the rows whose class is withheld, which classifier-free guidance needs (Ho and Salimans 2022,
            https://arxiv.org/abs/2207.12598).
        none: the label of no class; by default the model's ``config.num_classes``.
    """
    if not 0 <= dropped < 1:
        raise InputError(f"dropped is a share of the rows, at least 0 and below 1, got {dropped}")
    none = model.config.num_classes if none is None else none
    return model.with_technique(Noised(times, dropped, none), {})


class FlowMatching(Loss):
    """Mean squared error of ``velocity`` against ``x₁ - x₀``, over pixels and the rows of a batch.

    The model is ``noised``. Rows count by ``batch["weight"]``.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError unless the model is noised."""
        if "flow" not in outputs:
            raise MissingError("FlowMatching needs jtl.tasks.flow_matching.noised(model), in training")
        target = outputs["flow"]["target"].astype(jnp.float32)
        errors = jnp.square(outputs["velocity"].astype(jnp.float32) - target).mean((1, 2, 3))
        return rows.mean(errors, rows.weights(batch, len(errors))), {}


@partial(jax.jit, static_argnames=("steps", "method", "power", "none"))
def sample(
    model: Model,
    noise: Float[Array, "B H W C"],
    label: Int[Array, " B"],
    *,
    steps: int = 25,
    guidance: float | Float[Array, ""] = 2.0,
    method: Literal["euler", "heun"] = "heun",
    power: float = 1.0,
    none: int | None = None,
) -> Float[Array, "B H W C"]:
    """Images of the classes ``label``: ``dx/dt = velocity(x, t)`` from ``noise`` at t = 0 to t = 1.

    Args:
        model: as for ``noised``; forwards run without ``train``.
        noise: x₀, drawn from N(0, I). The same noise gives the same image.
        label: the class of each.
        steps: of time.
        guidance: s in ``v(none) + s (v(label) - v(none))``: 1 is the class as it was learned, more is more typical
            images and fewer kinds of them.
        method: ``euler``; or ``heun``, of second order and two forwards a step but the last, which is Euler's: a
            network that names the clean image has no velocity at t = 1.
        power: step i begins at ``(i / steps) ** power``: 1 makes equal steps, more makes the first ones shorter.
        none: the label of no class; by default the model's ``config.num_classes``.
    """
    none = model.config.num_classes if none is None else none
    rows = len(label)
    both = jnp.concatenate([label, jnp.full_like(label, none)])

    def velocity(x: Array, t: Any) -> Array:
        twice = jnp.concatenate([x, x])
        found = model({"image": twice, "time": jnp.full(2 * rows, t), "label": both})["velocity"]
        return found[rows:] + guidance * (found[:rows] - found[rows:])

    times = jnp.asarray((np.arange(steps + 1) / steps) ** power, jnp.float32)

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        start, end = ends
        first = velocity(x, start)
        there = x + (end - start) * first
        if method == "euler":
            return there, None
        return x + (end - start) / 2 * (first + velocity(there, end)), None

    x, _ = jax.lax.scan(step, noise, (times[:-2], times[1:-1]))
    return x + (1 - times[-2]) * velocity(x, times[-2])
