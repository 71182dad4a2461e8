"""Training on cached activations: the frozen layers below a cut are computed once, not in every step.

Freeze the lower layers, compute the activation at the cut once (``jtl.outputs.outputs``), and train the upper layers
from there (``resume_from``) or only the head (``head_alone``). The frozen prefix is not in the step: XLA removes what
nothing reads.

The cache holds a *deterministic* forward, without dropout and with running normalisation statistics. So this equals
training the full model exactly when its frozen prefix runs in that mode. Usual fine-tuning leaves dropout on below the
cut too; that cannot be cached, so nothing below the cut is random here. Data augmentation is likewise fixed at what
was cached. Dropout above the cut works as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jtl import heads, tree
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables
from jtl.trace import reads


@dataclass(frozen=True)
class Resume:
    """The technique behind ``resume_from``: the module at ``at`` returns ``batch["resumed"]``.

    Attributes:
        at: path of a Linen module that is called once and returns one array.
        needed: fields that the layers above read, such as an attention mask.
        blank: fields that nothing above reads, replaced by zeros where absent: (name, shape of a row, dtype).
    """

    at: str
    needed: tuple[str, ...] = ()
    blank: tuple[tuple[str, tuple[int, ...], Any], ...] = ()

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` from the cut on."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if "resumed" not in batch:
                fields = sorted(batch)
                raise MissingError(
                    f"the model resumes at {self.at!r}: put its cached activation in batch['resumed']; the batch "
                    f"is {fields}"
                )
            if lacking := [name for name in self.needed if name not in batch]:
                raise MissingError(
                    f"what lies above {self.at!r} reads the batch fields {lacking} too: keep them beside the "
                    f"activation, outputs(..., ('label', {str(lacking)[1:-1]}))"
                )
            if mode.stats == "batch":
                raise InputError(
                    f"a model that resumes at {self.at!r} has no batch statistics below: use stats='running'"
                )
            resumed = batch["resumed"]
            below: list[str] = []
            met: list[str] = []

            def intercept(
                call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
            ) -> Any:
                path = "/".join(context.module.path)
                if context.method_name != "__call__":
                    return call(*args, **kwargs)
                if path == self.at:
                    met.append(path)
                    return resumed
                if not met:
                    below.append(path)
                return call(*args, **kwargs)

            rows = len(resumed)
            zeros = {
                name: jnp.zeros((rows, *shape), dtype)
                for name, shape, dtype in self.blank
                if name not in batch
            }
            with nn.intercept_methods(intercept):
                outputs, state = forward(variables, {**batch, **zeros}, mode, key)
            if len(met) != 1:
                near = tree.near_misses(self.at, below)
                raise MissingError(
                    f"the forward called module {self.at!r} {len(met)} times; near misses: {near}"
                )
            lost = [tap for tap in mode.taps if tap in below and not self.at.startswith(f"{tap}/") and tap]
            if lost:
                raise MissingError(f"taps {lost} lie below {self.at!r}, where this model resumes")
            return outputs, state

        return run


def resume_from(model: Model, at: str, example: Mapping[str, Any] | None = None) -> Model:
    """Returns ``model`` resumed at the module ``at``, whose cached output the batch holds as ``batch["resumed"]``.

    Its outputs above the cut, and their gradients, are those of ``model`` on the cached rows. It keeps every
    parameter, so the trained model is ``model.with_params(resumed.params)``.

    Args:
        model: a model of Linen modules.
        at: where the activation was extracted: ``jtl.outputs.outputs(model, batches, (at,))``.
        example: one of those batches. Fields that nothing above the cut reads (images, for example) may then be absent
            from later batches, where zeros of the same shape replace them. Without an example, batches must carry all
            inputs.

    Raises:
        KeyError: no module lies at ``at``; near misses are listed. Without an example, the first forward raises it.
        ValueError: the module at ``at`` does not return one array.
    """
    if example is None:
        return _with(model, Resume(at))
    activation = jax.eval_shape(lambda model, batch: model(batch, taps=(at,)), model, example)["taps"][at]
    if not hasattr(activation, "shape"):
        raise InputError(f"module {at!r} returns {type(activation).__name__}, not one array: cut elsewhere")
    shapes = {name: jax.eval_shape(jnp.asarray, value) for name, value in sorted(example.items())}
    _, read = reads(
        lambda model, batch: model(batch), _with(model, Resume(at)), {**shapes, "resumed": activation}
    )
    needed = tuple(name for name in shapes if read[name])
    blank = tuple((name, value.shape[1:], value.dtype) for name, value in shapes.items() if not read[name])
    return _with(model, Resume(at, needed, blank))


def _with(model: Model, resume: Resume) -> Model:
    # Innermost, so that mixed precision casts the activation like every other input.
    return model.replace(techniques=(resume, *model.techniques))


def train_above(model: Model, batch: Batch, output: str = "logits") -> PyTree:
    """Labels for a resumed model: 1 for the parameters that ``output`` depends on, 0 for those below the cut.

    Freezing the prefix matters: weight decay would otherwise change it while the cached activations stay the same.

    Args:
        model: a resumed model.
        batch: one of its batches.
        output: the output that the loss reads.
    """
    used, _ = reads(lambda model, batch: model(batch)[output], model, batch)
    return jax.tree.map(float, used.params)


@dataclass(frozen=True)
class Fields:
    """A forward whose outputs are the fields of the batch."""

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """Returns the fields."""
        return dict(batch), {}  # type: ignore[arg-type]


def head_alone(model: Model, name: str = "head") -> Model:
    """Returns the head as a model of its own, which reads its features from the batch field of their name.

    Train it on ``jtl.outputs.outputs(model, batches, (head.on, "label"))`` in seconds, then put it back:
    ``model.with_params({**model.params, **trained.params})``.

    Raises:
        ValueError: the model has no such head.
    """
    head = heads.find(model, name)
    if head is None:
        raise InputError(f"the model has no head {name!r}: add one with jtl.heads.classifier first")
    return Model({"params": {name: model.params[name]}}, Fields(), (head,), model.config)
