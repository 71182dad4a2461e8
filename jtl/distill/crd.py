"""Contrastive representation distillation: Tian, Krishnan and Isola 2020, ICLR 2020, arXiv:1910.10699.

Student and teacher embeddings of one example attract, those of different examples repel. Negatives come from memories
of the embeddings of *all* examples, a collection of the model's variables, ``crd``, that each step updates. So a
batch needs ``index``, the example's place in the data set (batches of ``jtl.data`` have it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.distill.term import Term, column, is_tap, read, row_weight, taps
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

NAME = "crd"
SIDES = ("student", "teacher")


def crd(
    positive: Float[Array, " B"],
    negative: Float[Array, "B N"],
    examples: int,
    temperature: Any = 0.1,
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """``-log h(positive) - Σ log(1 - h(negative))``, the mean over rows, with ``h(s) = e^(s/τ) / (e^(s/τ) + N/M)``.

    Args:
        positive: inner products of the two unit embeddings of each example.
        negative: those with the embeddings of N other examples.
        examples: M, the size of the data set.
        temperature: τ.
        weight: of the rows.

    >>> round(float(crd(jnp.zeros(2), jnp.zeros((2, 3)), examples=3)), 4)  # four times log 2
    2.7726
    """
    # h is a sigmoid of s/τ - log(N/M).
    shift = math.log(negative.shape[1] / examples)
    attracted = jax.nn.log_sigmoid(positive / temperature - shift)
    repelled = jnp.sum(jax.nn.log_sigmoid(shift - negative / temperature), -1)
    return rows.mean(-attracted - repelled, weight)


def others(index: Int[Array, " B"], examples: int, count: int, key: Array) -> Int[Array, "B N"]:
    """``count`` examples for each of ``index``, drawn evenly from all but itself, with replacement."""
    drawn = jax.random.randint(key, (len(index), count), 0, examples - 1)
    return drawn + (drawn >= index[:, None])


@dataclass(frozen=True)
class Memory:
    """The technique behind ``memory``: the tap ``crd`` is the embeddings by side, and the memories move to them."""

    student: str
    teacher: str
    momentum: float
    name: ClassVar[str] = NAME

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the embeddings, and the updated memories in its state, when the loss asks for them."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            below = {name: leaves for name, leaves in variables.items() if name != NAME}
            if NAME not in mode.taps:
                return forward(below, batch, mode, key)
            inner = tuple(tap for tap in mode.taps if tap != NAME)
            inner = tuple(dict.fromkeys(inner + taps((self.student,))))
            outputs, state = forward(below, batch, replace(mode, taps=inner), key)
            needed = [name for name in (column(self.teacher), "index") if name not in batch]
            if needed or not isinstance(batch, Mapping):
                raise MissingError(
                    f"the memory of CRD reads the fields {needed} of the batch: put Distill outermost, "
                    "Distill(teacher, task + 0.5 * CRD()), and let batches carry the index of each example"
                )
            inputs = {
                "student": read(outputs, self.student),
                "teacher": jnp.asarray(batch[column(self.teacher)]),
            }
            embeddings = {
                side: rows.unit(_linear(variables["params"][NAME][side], rows.vectors(x)))
                for side, x in inputs.items()
            }
            state = {**state, NAME: self._updated(variables[NAME], embeddings, batch)}
            return {**outputs, "taps": {**outputs.get("taps", {}), NAME: embeddings}}, state

        return run

    def _updated(self, memory: Any, embeddings: Any, batch: Any) -> dict[str, Array]:
        index, weight = jnp.asarray(batch["index"]), row_weight(batch)
        examples = len(memory["student"])
        # Rows that only fill up would write to the last example: sent past the end, they are dropped.
        index = jnp.where(index < 0, examples, index)
        index = index if weight is None else jnp.where(weight > 0, index, examples)

        def moved(old: Array, new: Array) -> Array:
            kept = jnp.take(old, index, 0, mode="clip")
            mixed = rows.unit(self.momentum * kept + (1 - self.momentum) * new)
            return old.at[index].set(jax.lax.stop_gradient(mixed), mode="drop")

        return {side: moved(memory[side], embeddings[side]) for side in SIDES}


def _linear(leaves: Any, x: Float[Array, "B N"]) -> Float[Array, "B D"]:
    return x @ leaves["kernel"] + leaves["bias"][None]


def memory(
    model: Model,
    teacher: Model,
    *,
    examples: int,
    batch: Batch,
    key: Array,
    on: str = "features",
    teacher_on: str = "features",
    width: int = 128,
    momentum: float = 0.5,
) -> Model:
    """``model`` with what ``CRD`` needs: linear embeddings of both models' layers, which train, and two memories.

    The leaves are ``crd/student`` and ``crd/teacher`` in ``params``, the memories (M, width) the collection ``crd``.

    Args:
        model: the student.
        teacher: only its shapes are read.
        examples: M, the rows of the data set.
        batch: any batch, to see shapes.
        key: for the embeddings and the memories, which start on random directions.
        on: the student's layer: an output or a path.
        teacher_on: the teacher's.
        width: of the embeddings.
        momentum: how much of its old entry a memory keeps.
    """
    sizes = {
        side: math.prod(_shape(of, name, batch)[1:])
        for side, of, name in zip(SIDES, (model, teacher), (on, teacher_on), strict=True)
    }
    keys = dict(zip(SIDES, jax.random.split(key, 2), strict=True))
    leaves, memories = {}, {}
    for side, size in sizes.items():
        first, second = jax.random.split(keys[side])
        kernel = jax.random.normal(first, (size, width)) / math.sqrt(size)
        leaves[side] = {"kernel": kernel, "bias": jnp.zeros(width)}
        memories[side] = rows.unit(jax.random.normal(second, (examples, width)))
    model = model.with_technique(Memory(on, teacher_on, momentum), {NAME: leaves})
    return model.replace(variables={**model.variables, NAME: memories})


def _shape(model: Model, name: str, batch: Batch) -> tuple[int, ...]:
    wanted = (name,) if is_tap(name) else ()
    return read(jax.eval_shape(lambda model, batch: model(batch, taps=wanted), model, batch), name).shape


class CRD(Term):
    """``crd`` in both directions: the student against the teacher's memory, the teacher against the student's.

    The positives are the two embeddings of the batch itself, as the paper defines them (the authors' published code
    takes one side from the memory, and estimates a normaliser that the paper does not have). Negatives are other
    examples of any class. It needs a student with a ``memory``, a key, and ``Distill`` outermost.

    Attributes:
        negatives: N; the paper takes 16384.
        temperature: τ.
        teacher: the layer that ``memory`` was made for.
    """

    negatives: int = struct.field(pytree_node=False, default=16384)
    temperature: Any = 0.1
    teacher: str = struct.field(pytree_node=False, default="features")

    def student_names(self) -> tuple[str, ...]:
        """The embeddings."""
        return (NAME,)

    def teacher_names(self) -> tuple[str, ...]:
        """The layer that is embedded."""
        return (self.teacher,)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises ValueError without a key."""
        if key is None:
            raise InputError("CRD draws negatives: pass a key")
        embeddings, memories = read(outputs, NAME), model.variables[NAME]
        examples, weight = len(memories["student"]), row_weight(batch)
        index = others(jnp.asarray(batch["index"]), examples, self.negatives, key)
        positive = jnp.sum(embeddings["student"] * embeddings["teacher"], -1)
        total = jnp.zeros(())
        for side, other in (SIDES, SIDES[::-1]):
            negative = jnp.einsum("bd,bnd->bn", embeddings[side], memories[other][index])
            total += crd(positive, negative, examples, self.temperature, weight)
        return total, {}
