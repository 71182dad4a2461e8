"""The train step: loss, optimiser, labels and gradient in one compiled function.

``make_step(loss, optimizer, labels, gradient)`` combines three of the four slots; the model brings the leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jtl import sharding as meshes
from jtl import tree
from jtl.errors import InputError
from jtl.loss import Aux
from jtl.model import Batch, Model

# For steps with frozen weights on a CPU. XLA's YNN fusions of products store broadcast constants as whole arrays:
# without them a LoRA step of MiniLM on 32 x 128 tokens needs 28 % less memory and 10 % less time. They speed up the
# gradients of full weights, so full fine-tuning keeps them.
_LEAN_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}

LossFunction = Callable[[Model, Batch, Array], tuple[Array, Aux]]
Gradient = Callable[..., tuple[tuple[Array, Aux], PyTree]]


class TrainState(struct.PyTreeNode):
    """Everything that a step changes, and the frozen leaves that it reads.

    Attributes:
        trained: the trainable parameters; ``None`` where a leaf is frozen.
        collections: the other collections, such as ``batch_stats``.
        opt_state: the optimiser's state, for the trained leaves only.
        step: number of updates done, an int32 scalar.
        key: the run's random key; each step folds in its number.
        frozen: the model with ``None`` where a leaf trains, and without the other collections.
    """

    trained: PyTree
    collections: dict[str, Any]
    opt_state: PyTree
    # A pytree's fields may also hold its shapes or shardings, so these two cannot be typed as arrays.
    step: Any
    key: Any
    frozen: Model | None

    @property
    def model(self) -> Model:
        """The whole model in its current state."""
        assert self.frozen is not None
        params = tree.combine(self.trained, self.frozen.params)
        return self.frozen.replace(variables={"params": params, **self.collections})


def backprop(
    loss: Callable[..., Any], trained: PyTree, batch: Batch, key: Array
) -> tuple[tuple[Array, Aux], PyTree]:
    """The plain gradient: ``((value, aux), d value / d trained)`` of ``loss(trained, batch, key)``."""
    return jax.value_and_grad(loss, has_aux=True)(trained, batch, key)


def accumulate(pieces: int) -> Gradient:
    """Gradient accumulation: the mean gradient over ``pieces`` equal pieces of the batch, one at a time.

    Values, gradients and metrics of the pieces are averaged with equal weight, which equals the whole batch's for a
    loss that is a mean over rows. State such as ``batch_stats`` is averaged over the pieces too. The returned function
    raises ValueError if ``pieces`` does not divide the number of rows.
    """

    def gradient(loss: Callable[..., Any], trained: PyTree, batch: Batch, key: Array) -> Any:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % pieces:
            raise InputError(
                f"accumulate({pieces}): the batch has {rows} rows, which {pieces} does not divide"
            )
        # Row i goes to piece i % pieces, so that every device of a sharded batch keeps its own rows.
        split = jax.tree.map(lambda x: x.reshape(rows // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(carry: PyTree, piece: Any) -> tuple[PyTree, None]:
            part, part_key = piece
            return tree.add(carry, backprop(loss, trained, part, part_key)), None

        pieces_of = (split, jax.random.split(key, pieces))
        first = jax.tree.map(lambda x: x[0], pieces_of)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(backprop_of(loss), trained, *first)
        )
        total, _ = jax.lax.scan(one, zero, pieces_of)
        # Counters in the state stay integers; another dtype would recompile the step.
        return jax.tree.map(lambda x, like: (x / pieces).astype(like.dtype), total, zero)

    return gradient


def backprop_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``backprop`` of one loss as a function of arrays only."""
    return lambda trained, batch, key: backprop(loss, trained, batch, key)


class Step:
    """A compiled train step: see ``make_step``."""

    def __init__(
        self,
        loss: LossFunction,
        optimizer: optax.GradientTransformation,
        labels: PyTree | None,
        gradient: Gradient,
        mesh: Mesh | None,
        sharding: tree.Rules,
        compiler_options: Mapping[str, Any] | None,
    ) -> None:
        self.loss, self.optimizer, self.labels = loss, optimizer, labels
        self.gradient, self.mesh, self.sharding = gradient, mesh, sharding
        if compiler_options is None and jax.default_backend() == "cpu" and _some_frozen(labels):
            compiler_options = _LEAN_ON_CPU
        self.compiler_options = dict(compiler_options) if compiler_options else None
        # A jtl loss is a pytree and enters as an argument, so that its leaves are not compiled in as constants;
        # a plain function is static.
        plain = jax.tree_util.all_leaves([loss])
        self.loss_leaves: Any = None if plain else loss
        self._loss_def: Any = loss if plain else None
        # The caller keeps the frozen leaves; ``init`` copied everything else, which is updated in place.
        self._compiled = jax.jit(self.update, donate_argnums=0, compiler_options=self.compiler_options)

    def init(self, model: Model, key: Array) -> TrainState:
        """Return the state before the first step. The model's own arrays stay valid.

        Raises:
            ValueError: no parameter trains, or the labels are not of the model's parameters.
        """
        state = self._fresh(model, key)
        if self.mesh is None:
            return state
        self.loss_leaves = self._placed(self.loss_leaves)
        return meshes.place(state, self.mesh, self.sharding)

    def _placed(self, loss: Any) -> Any:
        """The leaves of a loss on the mesh, once: else every step would move them, or fail if one device has them."""
        return loss if self.mesh is None else meshes.put(loss, meshes.replicated(self.mesh))

    def _fresh(self, model: Model, key: Array) -> TrainState:
        labels = self._labels(model.params)
        mask = jax.tree.map(lambda label: callable(label) or label != 0, labels)
        if not any(jax.tree.leaves(mask)):
            raise InputError("nothing trains: every label is 0; label at least one leaf with a rate")
        trained, frozen = tree.partition(model.params, mask)
        collections = {name: leaves for name, leaves in model.variables.items() if name != "params"}
        trained, collections = jax.tree.map(jnp.array, (trained, collections))
        return TrainState(
            trained=trained,
            collections=collections,
            opt_state=self.optimizer.init(trained),
            step=jnp.zeros((), jnp.int32),
            key=jnp.array(key),
            frozen=model.replace(variables={"params": frozen}),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Do one update. ``state`` must not be used again, since its memory is reused.

        Returns:
            The next state, and the batch's metrics, among them ``loss`` and ``gradient_norm``.
        """
        changed, metrics = self._compiled(state.replace(frozen=None), state.frozen, self.loss_leaves, batch)
        return changed.replace(frozen=state.frozen), metrics

    def with_loss(self, loss: LossFunction) -> Step:
        """Return this step, with its compiled programs, for a loss of the same structure with other leaves.

        Raises:
            ValueError: the structures differ, or the loss is a plain function, which has no leaves.
        """
        own: Any = jax.tree.structure(self.loss)
        if self.loss_leaves is None or own != jax.tree.structure(loss):
            raise InputError(
                f"with_loss needs a jtl loss of this step's own structure, {type(self.loss).__name__} of equal static "
                "parts: make another step, make_step(loss, ...)"
            )
        other = copy.copy(self)
        other.loss, other.loss_leaves = loss, self._placed(loss)
        return other

    def lower(self, model: Model, batch: Batch) -> Any:
        """Lower the step for these shapes: nothing runs, and the mesh's devices need not be available.

        ``.compile()`` the result for ``memory_analysis()``, ``cost_analysis()`` and ``as_text()``, for example to see
        whether and how the step fits a TPU slice.

        Args:
            model: with arrays or ``jax.ShapeDtypeStruct``s as leaves.
            batch: likewise.
        """
        state = jax.eval_shape(self._fresh, model, jax.random.key(0))
        loss, batch = jax.eval_shape(lambda values: values, (self.loss_leaves, batch))
        if self.mesh is not None:
            state = meshes.described(state, meshes.shardings(state, self.mesh, self.sharding))
            rows, whole = meshes.rows(self.mesh), meshes.replicated(self.mesh)
            batch = meshes.described(batch, jax.tree.map(lambda _: rows, batch))
            loss = meshes.described(loss, jax.tree.map(lambda _: whole, loss))
        return self._compiled.lower(state.replace(frozen=None), state.frozen, loss, batch)

    def _labels(self, params: PyTree) -> PyTree:
        if self.labels is None:
            return jax.tree.map(lambda _: 1.0, params)
        is_label = lambda label: callable(label) or isinstance(label, (int, float))  # noqa: E731
        given = tree.flatten(jax.tree.map(lambda _: 0, self.labels, is_leaf=is_label))
        wrong = sorted(given.keys() ^ tree.flatten(params).keys())
        if wrong:
            raise InputError(
                f"labels and params differ at {wrong[:5]}; make the labels from this model's own params"
            )
        return self.labels

    def update(
        self, state: TrainState, frozen: Model, loss: Any, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Compute one update, pure and not compiled; ``loss`` is ``loss_leaves``, and the state has no frozen part."""
        loss = self._loss_def if loss is None else loss
        step_key = jax.random.fold_in(state.key, state.step)
        batch = meshes.shard_batch(batch, self.mesh)

        def value(trained: PyTree, batch: Batch, key: Array) -> tuple[Array, Aux]:
            params = tree.combine(trained, frozen.params)
            return loss(frozen.replace(variables={"params": params, **state.collections}), batch, key)

        (total, aux), gradients = self.gradient(value, state.trained, batch, step_key)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        updates = self._rated(updates, frozen, state)
        trained = optax.apply_updates(state.trained, updates)
        changed = state.replace(
            trained=trained,
            collections={**state.collections, **aux.state},
            opt_state=opt_state,
            step=state.step + 1,
        )
        changed = meshes.constrain(changed.replace(frozen=frozen), self.mesh, self.sharding).replace(
            frozen=None
        )
        return changed, {**aux.metrics, "loss": total, "gradient_norm": tree.norm(gradients)}

    def _rated(self, updates: PyTree, frozen: Model, state: TrainState) -> PyTree:
        if self.labels is None:
            return updates

        def rate(update: Any, label: Any) -> Any:
            if update is None:
                return None
            return update * (label(state.step) if callable(label) else label)

        return jax.tree.map(rate, updates, self.labels, is_leaf=lambda x: x is None)


def _some_frozen(labels: PyTree | None) -> bool:
    return any(not callable(label) and label == 0 for label in jax.tree.leaves(labels))


def make_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    labels: PyTree | None = None,
    *,
    gradient: Gradient = backprop,
    mesh: Mesh | None = None,
    sharding: tree.Rules = meshes.REPLICATED,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """Return a train step: ``state = step.init(model, key)``, then ``state, metrics = step(state, batch)``.

    It is one ``jit``, which compiles once per batch shape. Frozen leaves get no gradient and no optimiser state and
    stay bit-identical.

    Args:
        loss: ``(model, batch, key) -> (value, Aux)``; a ``jtl.loss.Loss`` or your own function.
        optimizer: any optax transformation; it sees only the trained leaves.
        labels: a tree like the parameters (see ``jtl.finetune``) with each leaf's rate, by which its update is
            multiplied. 0 freezes; an optax schedule (``step -> rate``) varies it. By default all train at 1.
        gradient: how the gradient is computed: ``backprop``, ``accumulate(n)``, or your own
            ``(loss, trained, batch, key) -> ((value, aux), gradients)``.
        mesh: the devices, with an axis ``"data"`` over which batches are split; None for one device.
        sharding: rules from parameter paths to layouts on the mesh (``jtl.sharding``).
        compiler_options: XLA options for this step only. By default, steps with frozen leaves on a CPU use those that
            need less memory; ``{}`` sets none.
    """
    return Step(loss, optimizer, labels, gradient, mesh, sharding, compiler_options)
