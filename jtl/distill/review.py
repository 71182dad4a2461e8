"""ReviewKD: each level of the teacher teaches the student's level of that depth *and* all deeper ones.

From the deepest level up, attention fuses the student's maps, and each fused map is compared with the teacher's map of
its level. Chen, Liu, Zhao and Jia 2021, "Distilling Knowledge via Knowledge Review", CVPR 2021,
https://arxiv.org/abs/2104.09044.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Term, read, row_weight
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs

POOLED = (4, 2, 1)


def hierarchical_context(
    student: Float[Array, "B H W C"], teacher: term.Teacher, weight: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """The hierarchical context loss: mean squared differences of the maps and of their averages over coarse grids.

    The grids are 4 x 4, 2 x 2 and 1 x 1, where smaller than H. The whole map has weight 1 and each grid half the
    weight before it; the sum is divided by the sum of the weights (as in the authors' published code; the paper only
    names the pyramid).

    Args:
        student: fused maps.
        teacher: its maps, of the same shape.
        weight: of the rows.

    Raises:
        ValueError: the shapes differ.
    """
    term.same(
        "ReviewKD", student, teacher, "build the review module with the teacher's shapes, level by level"
    )
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)

    def squares(difference: Array) -> Array:
        return jnp.mean(jnp.square(difference), (1, 2, 3))

    # Averaging is linear, so the difference of averages is the average difference.
    difference = student - teacher
    total, factor, factors = squares(difference), 1.0, 1.0
    for grid in POOLED:
        if grid < student.shape[1]:
            factor /= 2
            total += factor * squares(_average(difference, grid))
            factors += factor
    return rows.mean(total, weight) / factors


def _average(x: Float[Array, "B H W C"], grid: int) -> Float[Array, "B g g C"]:
    """Averages over the cells of a ``grid`` by ``grid`` partition, whose borders round outwards."""
    first, second = (jnp.asarray(_cells(size, grid)) for size in x.shape[1:3])
    return jnp.einsum("bhwc,gh,fw->bgfc", x, first, second)


def _cells(size: int, grid: int) -> np.ndarray:
    """(grid, size): row g averages positions floor(g·size/grid) to ceil((g+1)·size/grid)."""
    cells = np.zeros((grid, size), np.float32)
    for g in range(grid):
        start, stop = g * size // grid, -(-(g + 1) * size // grid)
        cells[g, start:stop] = 1 / (stop - start)
    return cells


class Review(nn.Module):
    """Attention-based fusion of a student's maps, shallowest first, into maps of the teacher's shapes.

    Add it to a student by ``regressor(student, Review(shapes), on=(...), name="review", ...)``. The authors' modules
    have batch normalisation after each convolution; here there is none, because a regressor has only parameters.

    Attributes:
        shapes: (H, W, C) of the teacher's map at each level, shallowest first; H and W must be those of the student.
        width: channels in which levels are fused.
    """

    shapes: tuple[tuple[int, int, int], ...]
    width: int = 64

    @nn.compact
    def __call__(self, *levels: Float[Array, "B _H _W _C"]) -> tuple[Float[Array, "B _H _W _C"], ...]:
        """Returns the fused map of each level."""
        if len(levels) != len(self.shapes):
            raise InputError(f"Review: {len(levels)} student levels, {len(self.shapes)} teacher shapes")
        fused: list[Array] = []
        above = None
        for level in reversed(range(len(levels))):
            height, width, channels = self.shapes[level]
            x = nn.Conv(self.width, (1, 1), use_bias=False, name=f"narrow_{level}")(levels[level])
            if x.shape[1:3] != (height, width):
                raise InputError(
                    f"Review: level {level} of the student is {x.shape[1]} x {x.shape[2]}, that of the teacher "
                    f"{height} x {width}; choose levels of equal resolution"
                )
            if above is not None:
                above = jax.image.resize(above, x.shape, "nearest")
                both = jnp.concatenate([x, above], -1)
                gates = nn.sigmoid(nn.Conv(2, (1, 1), name=f"attention_{level}")(both))
                x = x * gates[..., :1] + above * gates[..., 1:]
            above = x
            fused.append(nn.Conv(channels, (3, 3), use_bias=False, name=f"widen_{level}")(x))
        return tuple(reversed(fused))


class ReviewKD(Term):
    """``hierarchical_context`` between a ``Review`` in the student and the teacher, summed over levels.

    Attributes:
        teacher: names of the teacher's maps, shallowest first.
        student: name of the ``Review`` regressor.
    """

    teacher: tuple[str, ...] = struct.field(pytree_node=False)
    student: str = struct.field(pytree_node=False, default="review")

    def student_names(self) -> tuple[str, ...]:
        """Returns the name of the fused maps."""
        return (self.student,)

    def teacher_names(self) -> tuple[str, ...]:
        """Returns the names of the teacher's maps."""
        return self.teacher

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            ValueError: student and teacher have different numbers of levels.
        """
        fused = read(outputs, self.student)
        if len(fused) != len(self.teacher):
            raise InputError(f"ReviewKD: {len(fused)} fused levels, {len(self.teacher)} teacher layers")
        parts = [
            hierarchical_context(own, self.taught(batch, name), row_weight(batch))
            for own, name in zip(fused, self.teacher, strict=True)
        ]
        return sum(parts, jnp.zeros(())), {}
