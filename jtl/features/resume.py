"""Training on cached activations: what lies below a frozen cut is never computed again.

Freeze the lower layers, ``extract`` the activation at the cut once, and train the upper layers from there
(``resume_from``), or only the head (``head_alone``). The step has no prefix left: XLA removes what nobody reads.

The cache holds a *deterministic* forward, without dropout and with running normalisation statistics. So
this equals training the full model exactly when its frozen prefix runs in that mode. Usual fine-tuning
leaves dropout on below the cut too; it cannot be cached, and nothing random below the cut is seen here.
Data augmentation is likewise as cached. Dropout above the cut works as ever.
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
        blank: fields that nothing above reads; zeros stand for absent ones: (name, shape of a row, dtype).
    """

    at: str
    needed: tuple[str, ...] = ()
    blank: tuple[tuple[str, tuple[int, ...], Any], ...] = ()

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` from the cut on."""

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
    """``model`` resumed at the module ``at``, whose cached output comes as ``batch["resumed"]``.

    Its outputs above the cut, and their gradients, are those of ``model`` on the rows that were cached. Every
    parameter stays, so the trained model is ``model.with_params(resumed.params)``.

    Args:
        model: a model of Linen modules.
        at: where the activation was extracted: ``jtl.outputs.outputs(model, batches, (at,))``.
        example: one of those batches. Fields that nothing above the cut reads (images, say) need not be in
            later batches: zeros of the same shape stand for them; the other fields must. Without an example
            batches must carry all inputs.

    Raises:
        KeyError: ``example`` shows that no module lies at ``at``; near misses are listed. Without an example the
            first forward raises it.
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
    # Innermost, so that mixed precision casts the activation as it casts every input.
    return model.replace(techniques=(resume, *model.techniques))


def train_above(model: Model, batch: Batch, output: str = "logits") -> PyTree:
    """Labels for a resumed model: 1 for the parameters that ``output`` depends on, 0 for those below the cut.

    With them weight decay cannot move the prefix behind the cache's back.
    """
    used, _ = reads(lambda model, batch: model(batch)[output], model, batch)
    return jax.tree.map(float, used.params)


@dataclass(frozen=True)
class Fields:
    """A forward whose outputs are the batch's own fields."""

    def __call__(
        self, variables: Variables, batch: Batch, mode: Mode, key: Array | None
    ) -> tuple[Outputs, State]:
        """The fields."""
        return dict(batch), {}  # type: ignore[arg-type]


def head_alone(model: Model, name: str = "head") -> Model:
    """The head as a model of its own, which reads its features from the batch field of their name.

    Train it on ``jtl.outputs.outputs(model, batches, (head.on, "label"))`` in seconds, then put it back:
    ``model.with_params({**model.params, **trained.params})``.

    Raises ValueError if the model has no such head.
    """
    head = heads.find(model, name)
    if head is None:
        raise InputError(f"the model has no head {name!r}: add one with jtl.heads.classifier first")
    return Model({"params": {name: model.params[name]}}, Fields(), (head,), model.config)
