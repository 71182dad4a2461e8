"""LP-FT (linear probing, then fine-tuning): fit the head on frozen features, then train all parameters from there.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
https://arxiv.org/abs/2202.10054.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl import heads
from jtl.errors import InputError
from jtl.model import Model


def put_head(
    model: Model,
    kernel: Float[Array, "D C"] | Float[np.ndarray, "D C"],
    bias: Float[Array, " C"] | Float[np.ndarray, " C"],
    name: str = "head",
) -> Model:
    """Copies the weights of a linear probe into the model's linear head: the first half of LP-FT.

    On frozen features, fitting the head is a convex problem that a probe (``jtl.features``) solves exactly, once.
    Training all leaves from here is the second half. The probe must have read the output that the head reads
    (``jtl.heads.find(model).on``).

    Args:
        model: a model with a linear head.
        kernel: the probe's weights (D, C).
        bias: its bias (C,).
        name: of the head.

    Raises:
        ValueError: the model has no such head, the head has a hidden layer (no probe solves that) or no bias, or a
            shape differs.
    """
    head = heads.find(model, name)
    if head is None:
        raise InputError(f"the model has no head {name!r}: add one with jtl.heads.classifier first")
    if set(model.params[name]) != {"out"}:
        raise InputError(
            f"head {name!r} has layers {sorted(model.params[name])}, not just a linear 'out': attach a linear "
            "one, jtl.heads.classifier(model, classes, on='features', width=D, key=key)"
        )
    old = model.params[name]["out"]
    if "bias" not in old:
        raise InputError(f"head {name!r} has no bias, which a probe has: attach one with on= and width=")
    new = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    for leaf, value in new.items():
        if old[leaf].shape != value.shape:
            raise InputError(
                f"{name}/out/{leaf} has shape {old[leaf].shape}, the given one {value.shape}; the head reads "
                f"output {head.on!r}: fit the probe on that, with all classes"
            )
    cast = {leaf: value.astype(old[leaf].dtype) for leaf, value in new.items()}
    return model.with_params({**model.params, name: {"out": cast}})
