"""Makes a shallower student from its teacher by keeping some of its layers, as DistilBERT does.

Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
https://arxiv.org/abs/1910.01108, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jtl import tree
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Cast, Linen, Model, with_config

DEPTHS = (
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_layers",
)  # names of the number of layers in configurations


def choose_layers(teacher: Model, layers: Sequence[int], *, stack: str = "encoder/layer_") -> Model:
    """Returns the teacher with only ``layers`` of its stack, renumbered in order; everything else, heads too, is kept.

    DistilBERT takes every other layer: ``choose_layers(teacher, range(0, 12, 2))``. The leaves are the teacher's own
    arrays, including embeddings; nothing is copied.

    Args:
        teacher: a model of ``jtl.models`` whose layers are all alike, such as BERT, RoBERTa, DistilBERT, ViT, DINOv2.
        layers: numbers of the layers to keep, ascending from 0.
        stack: the start of the layers' paths, before the number. ``"decoder/layer_"`` for Llama and GPT-2 and, to make
            a Distil-Whisper (https://arxiv.org/abs/2311.00430), for Whisper and T5.

    Raises:
        ValueError: there are no such layers, the model cannot be rebuilt with fewer, or it has techniques that name
            layers.
    """
    side = stack.split("/")[0]
    names = (
        f"{side}_layers",
        f"num_{side}_layers",
        *DEPTHS,
    )  # encoder and decoder each have their own depth
    field = next((name for name in names if hasattr(teacher.config, name)), None)
    if field is None or not isinstance(teacher.base, Linen):
        raise InputError(
            f"choose_layers rebuilds models of jtl.models with a depth ({' or '.join(names)}) alone"
        )
    check_bare(teacher)
    depth, kept = getattr(teacher.config, field), list(layers)
    if not kept or kept != sorted({*kept} & {*range(depth)}):
        raise InputError(f"layers must be ascending numbers from 0 to {depth - 1}, got {kept}")
    leaves = {}
    for path, leaf in tree.flatten(teacher.params).items():
        number = re.match(rf"{re.escape(stack)}(\d+)/", path)
        if number is None:
            leaves[path] = leaf
        elif int(number[1]) in kept:
            leaves[f"{stack}{kept.index(int(number[1]))}/{path[number.end() :]}"] = leaf
    found = {path.removeprefix(stack).split("/")[0] for path in leaves if path.startswith(stack)}
    if len(found) != len(kept):
        raise InputError(f"no leaves under {stack!r} for {len(kept)} layers: name the stack of this model")
    return rebuild(teacher, tree.nest(leaves), **{field: len(kept)})


def check_bare(model: Model) -> None:
    """Checks that ``model`` has only heads and casts as techniques; paths or shapes of others would be stale.

    Raises:
        ValueError: it has other techniques.
    """
    rest = [
        type(technique).__name__ for technique in model.techniques if not isinstance(technique, Head | Cast)
    ]
    if rest:
        raise InputError(
            f"the teacher has {rest} in it: merge adapters and remove regressors before cutting it"
        )


def rebuild(model: Model, params: dict[str, Any], **dimensions: int) -> Model:
    """Returns ``model`` with ``params`` and its configuration changed in ``dimensions``."""
    return with_config(model.with_params(params), **dimensions)
