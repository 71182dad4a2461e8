"""Models of jtl beside models of `transformers`: every named output on the same inputs, apart from padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jtl.model import Batch, Model


def errors(model: Model, inputs: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The `error` of each output and hidden state that `theirs` names, where inputs are real.

    Args:
        model: of ``jtl.models``.
        inputs: a batch, as ``experiments.models.random_models.batch`` makes it.
        theirs: arrays by the name of an output of ours or the path of a module, as
            ``experiments.models.random_models.run`` gives them.
    """
    ours = outputs(model, inputs, (*theirs, *_known(model, inputs) & {"sequence_mask"}))
    mask = ours.get("sequence_mask")
    return {
        name: error(at_real(name, ours[name], inputs, mask), at_real(name, value, inputs, mask))
        for name, value in theirs.items()
    }


def outputs(model: Model, inputs: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """The named outputs of the model; a name that is no output is a tap, the path of a module."""
    known = _known(model, inputs)
    taps = tuple(name for name in names if name not in known)
    found = jax.jit(lambda model, inputs: model(inputs, taps=taps))(model, inputs)
    return {name: found["taps"][name] if name in taps else found[name] for name in names}


def _known(model: Model, inputs: Batch) -> set[str]:
    return set(jax.eval_shape(lambda model, inputs: model(inputs), model, inputs))


def at_real(name: str, value: Any, inputs: Mapping[str, Any], sequence_mask: Any = None) -> np.ndarray:
    """Zero at padded places of an output (B, L, D), which mean nothing; other outputs as they are.

    Args:
        name: of the output: what begins with "enc" is the encoder's where there is a decoder too.
        value: the output.
        inputs: with the masks, if any.
        sequence_mask: of the model's own places, where these are not those of the input.
    """
    value = np.asarray(value)
    side = "decoder_" if "decoder_input_ids" in inputs and not name.startswith("enc") else ""
    mask = inputs.get(f"{side}attention_mask") if sequence_mask is None else np.asarray(sequence_mask)
    if mask is None or value.ndim != 3 or value.shape[:2] != mask.shape:
        return value
    return value * (mask != 0)[..., None]


def error(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
