"""FSP (flow of solution procedure): matches the Gram matrices between two layers of student and teacher.

Yim, Joo, Bae and Kim 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR 2017.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs


def fsp_matrix(first: Float[Array, "B ... C"], second: Float[Array, "B ... E"]) -> Float[Array, "B C E"]:
    """Returns ``Σ_positions first_c · second_e / positions``: how features flow from one layer to a later one.

    Raises:
        ValueError: rows or positions differ.
    """
    if first.ndim < 3 or first.shape[:-1] != second.shape[:-1]:
        raise InputError(
            f"the FSP matrix needs two layers with the same positions, found {first.shape} and {second.shape}: "
            "take both within one stage, or pool the larger"
        )
    a, b = (x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32) for x in (first, second))
    return jnp.einsum("bpc,bpe->bce", a, b) / a.shape[1]


def fsp(
    student: tuple[Float[Array, "B ... C"], Float[Array, "B ... E"]],
    teacher: tuple[term.Teacher, term.Teacher],
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """The mean over rows of ``||G_t - G_s||²`` (Frobenius), G the FSP matrix of a pair of layers.

    Args:
        student: its two layers.
        teacher: its two layers; a regressor can map the student's to these widths.
        weight: of the rows.

    Raises:
        ValueError: widths or rows differ.
    """
    own, other = fsp_matrix(*student), fsp_matrix(*teacher)
    term.same("FSP matrix", own, other, "put regressors to the teacher's widths on the student's layers")
    return rows.mean(jnp.sum(jnp.square(other - own), (1, 2)), weight)


class FSP(Layers):
    """``fsp`` between two layers of the student and two of the teacher. For several pairs, add several."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            ValueError: ``student`` and ``teacher`` do not name two layers each.
        """
        pairs = self.pairs(outputs, batch)
        if len(pairs) != 2:
            raise InputError(
                f"FSP takes two layers of the student and two of the teacher, found {len(pairs)}"
            )
        (first, earlier), (second, later) = pairs
        return fsp((first, second), (earlier, later), row_weight(batch)), {}
