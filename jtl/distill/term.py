"""``Term``: the base of distillation losses, and the names by which they read outputs of student and teacher.

A term reads the student's outputs from the step's one forward and the teacher's from the batch: ``teacher_logits``,
and ``teacher/NAME`` for any other output. ``Distill`` fills these columns with a forward of the teacher. A loader may
also read them from a file; then no teacher is needed.

A NAME is ``features``, ``pooled``, ``sequence``, ``map``, ``logits`` or ``token_logits`` (an output of the model),
``outputs/x`` (its output ``x``), or else the path of a module: a tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Mode, Outputs

OUTPUTS = ("logits", "token_logits", "features", "pooled", "sequence", "map")


def is_tap(name: str) -> bool:
    """Whether ``name`` is the path of a module rather than an output of the model."""
    return name not in OUTPUTS and not name.startswith("outputs/")


def taps(names: Sequence[str]) -> tuple[str, ...]:
    """Returns those of ``names`` that are paths of modules, once each."""
    return tuple(dict.fromkeys(name for name in names if is_tap(name)))


def read(outputs: Outputs, name: str) -> Any:
    """Returns the output or tap called ``name``.

    Raises:
        KeyError: there is none; near misses are listed.
    """
    place = outputs.get("taps", {}) if is_tap(name) else outputs
    name = name.removeprefix("outputs/")
    if name not in place:
        near = tree.near_misses(name, place) or sorted(place)
        raise MissingError(f"the model gives no {name!r}; near misses: {near}")
    return place[name]


def column(name: str) -> str:
    """Returns the batch field that holds the teacher's output or tap ``name``.

    >>> column("logits"), column("encoder/layer_3")
    ('teacher_logits', 'teacher/encoder/layer_3')
    """
    return "teacher_logits" if name == "logits" else f"teacher/{name}"


def columns(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Renames arrays (for example from ``jtl.outputs.outputs(teacher, batches, names)``) to the columns of a batch."""
    return {column(name): value for name, value in arrays.items()}


class Term(Loss, kw_only=True):
    """Base of the distillation losses, which read the teacher from the batch.

    Rows of ``batch["weight"]`` 0 (padding of a last batch) do not count. If the batch has an ``attention_mask`` (B,
    L), activations (B, L, D) of student and teacher are set to 0 at padding tokens.

    Attributes:
        stats: normalise the student by ``"running"`` or ``"batch"`` statistics, like the task loss that it is added
            to.
    """

    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def student_names(self) -> tuple[str, ...]:
        """Returns the names it reads from the student."""
        return ("logits",)

    def teacher_names(self) -> tuple[str, ...]:
        """Returns the names it reads from the teacher."""
        return ("logits",)

    def mode(self) -> Mode:
        """Returns the mode with dropout on, the chosen normalisation, and the student's taps."""
        return Mode(train=True, stats=self.stats, taps=taps(self.student_names()))

    def taught(self, batch: Batch, name: str) -> Any:
        """Returns the teacher's ``name``, from the batch.

        Raises:
            KeyError: the batch lacks it.
        """
        if column(name) not in batch:
            raise MissingError(
                f"{type(self).__name__} reads batch[{column(name)!r}]; the batch has {sorted(batch)}: wrap the loss, "
                f"Distill(teacher, {type(self).__name__}(...)), or bring that column with the batch"
            )
        return jax.lax.stop_gradient(_without_padding(batch[column(name)], batch))


class Layers(Term):
    """Base of the losses between layers: ``student`` and ``teacher`` name one layer each, or equally many.

    Attributes:
        student: name of the student's layer (or of its regressor), or names.
        teacher: name of the teacher's layer, or names.
    """

    student: str | tuple[str, ...] = struct.field(pytree_node=False, default="features")
    teacher: str | tuple[str, ...] = struct.field(pytree_node=False, default="features")

    def student_names(self) -> tuple[str, ...]:
        """Returns its layers."""
        return (self.student,) if isinstance(self.student, str) else self.student

    def teacher_names(self) -> tuple[str, ...]:
        """Returns its layers."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    def pairs(self, outputs: Outputs, batch: Batch) -> list[tuple[Array, Array]]:
        """Returns the activations of student and teacher, layer by layer.

        Raises:
            ValueError: the numbers of layers differ.
        """
        own, other = self.student_names(), self.teacher_names()
        if len(own) != len(other):
            raise InputError(f"{type(self).__name__}: {len(own)} student layers, {len(other)} teacher layers")
        return [
            (student_output(outputs, batch, a), self.taught(batch, b))
            for a, b in zip(own, other, strict=True)
        ]


def student_output(outputs: Outputs, batch: Batch, name: str) -> Any:
    """Returns the student's ``name``, with padding tokens set to 0."""
    return _without_padding(read(outputs, name), batch)


def row_weight(batch: Batch) -> Float[Array, " B"] | None:
    """Returns the weights of the rows, or None if all count alike."""
    return jnp.asarray(batch["weight"], jnp.float32) if "weight" in batch else None


def token_mask(
    batch: Batch, shape: tuple[int, ...], name: str = "attention_mask"
) -> Float[Array, "B L"] | None:
    """Returns 1 at real tokens of rows that count, or None unless ``shape`` (B, L, ...) fits the mask ``name``."""
    mask = batch.get(name)
    if mask is None or len(shape) != 3 or jnp.shape(mask) != shape[:2]:
        return None
    weight = row_weight(batch)
    mask = (jnp.asarray(mask) != 0).astype(jnp.float32)
    return mask if weight is None else mask * weight[:, None]


def _without_padding(value: Any, batch: Batch) -> Any:
    mask = batch.get("attention_mask")

    def zeroed(x: Array) -> Array:
        if mask is None or x.ndim != 3 or jnp.shape(mask) != x.shape[:2]:
            return x
        return jnp.where(jnp.expand_dims(jnp.asarray(mask) != 0, -1), x, 0)

    return jax.tree.map(zeroed, value)


Teacher = Float[Array, "..."]  # any shape: ``same`` checks it, and its errors say what to do


def same(what: str, student: Array, teacher: Array, advice: str) -> None:
    """Checks that both have the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(f"{what}: the student gives {student.shape}, the teacher {teacher.shape}; {advice}")


def same_classes(student: Array, teacher: Array) -> None:
    """Checks that both logits have the same shape: rows, positions of a sequence, and classes.

    Raises:
        ValueError: the shapes differ.
    """
    if student.ndim == 3 and student.shape[1] != teacher.shape[1]:
        advice = "tokenise both alike: one tokenizer and one padded length"
    else:
        advice = "both need the same rows and the same classes (or vocabulary), in the same order"
    same("logits", student, teacher, advice)


def same_rows(what: str, student: Array, teacher: Array) -> None:
    """Checks that both have the same number of rows.

    Raises:
        ValueError: the numbers differ.
    """
    if student.shape[0] != teacher.shape[0]:
        raise InputError(
            f"{what}: the student gives {student.shape[0]} rows, the teacher {teacher.shape[0]}; one batch for both"
        )
