"""Choosing which parameters train: trees of learning-rate factors for ``make_step(loss, optimizer, labels)``.

The tree has the shape of the parameters, and a label multiplies the update of its leaf. 0 freezes the leaf (no
gradient, no optimiser state), 1 is the full rate, and a schedule ``step -> rate`` varies it.

A recipe that is a single rule needs no helper. These work for every architecture of ``jtl.models``:

* BitFit (Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
  Language-models", https://arxiv.org/abs/2106.10199), all biases and the head:
  ``train_only(model, ".*/bias|head/.*")``;
* norm tuning, all scales and shifts of norms and the head: ``train_only(model, ".*norm/(scale|bias)|head/.*")``;
* LoRA+ (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", https://arxiv.org/abs/2402.12354),
  which trains B faster than A, about 16 times in the paper:
  ``tree.assign([(".*/lora/b", 16.0), (".*/lora/.*|head/.*", 1.0), (".*", 0.0)], model.params)``. B is faster because
  it starts at 0; in an adapted embedding it is A that starts at 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Model


def train_all(model: Model) -> PyTree:
    """Every leaf at the full rate: full fine-tuning, or training from scratch."""
    return jax.tree.map(lambda _: 1.0, model.params)


def train_only(model: Model, pattern: str) -> PyTree:
    """Trains the leaves whose whole path matches ``pattern`` at the full rate and freezes all others.

    Raises:
        RuleError: no path matches.

    >>> from jtl.wrap import function
    >>> model = function(lambda params: params, {"body": {"w": 1.0}, "head": {"w": 1.0}})
    >>> train_only(model, "head/.*")
    {'body': {'w': 0.0}, 'head': {'w': 1.0}}
    """
    return jax.tree.map(float, tree.matches(pattern, model.params))


def freeze(model: Model, pattern: str) -> PyTree:
    """Freezes the leaves whose whole path matches ``pattern`` and trains all others at the full rate.

    Raises:
        RuleError: no path matches.

    >>> from jtl.wrap import function
    >>> model = function(lambda params: params, {"body": {"w": 1.0}, "head": {"w": 1.0}})
    >>> freeze(model, "body/.*")
    {'body': {'w': 0.0}, 'head': {'w': 1.0}}
    """
    return jax.tree.map(lambda frozen: 1.0 - frozen, tree.matches(pattern, model.params))


def layerwise(model: Model, decay: float, *, groups: Sequence[str] | None = None) -> PyTree:
    """Layer-wise rate decay: the rate of each leaf is ``decay^(depth of the head - depth of the leaf)``.

    The head trains at rate 1, so the optimiser's learning rate is the head's. Howard and Ruder 2018, "Universal
    Language Model Fine-tuning for Text Classification" (ULMFiT), https://arxiv.org/abs/1801.06146, section 3.2, use
    ``decay = 1 / 2.6``; Clark et al. 2020 (ELECTRA), https://arxiv.org/abs/2003.10555, use 0.8 for a base and 0.9 for
    a large model.

    Args:
        model: the model to train.
        decay: the ratio between the rates of neighbouring layers, above 0.
        groups: how depth is counted: see ``depths``.

    Raises:
        ValueError: ``decay`` is not above 0; or as ``depths`` does.
        RuleError: as ``depths`` does.
    """
    if decay <= 0:
        raise InputError(f"decay must be over 0, got {decay}; to freeze layers use train_only or freeze")
    depth = depths(model, groups)
    top = max(jax.tree.leaves(depth))
    return jax.tree.map(lambda d: float(decay) ** (top - d), depth)


@dataclass(frozen=True)
class Since:
    """A schedule: 0 before update number ``start`` (counted from 0), then ``rate``."""

    start: int
    rate: float

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the rate at ``step``."""
        return jnp.where(step >= self.start, self.rate, 0.0)


def gradual_unfreezing(
    model: Model, every: int, *, groups: Sequence[str] | None = None, rates: PyTree | None = None
) -> PyTree:
    """Gradual unfreezing: the head trains first, then one more group, from top to bottom, every ``every`` updates.

    Howard and Ruder 2018, section 3.3. The labels are schedules, so one compiled step serves the whole run. While a
    group is held its rate is 0: its updates, including weight decay, are multiplied by 0 and its parameters do not
    change. But its gradients are computed from the first step and enter the optimiser's moments. So time and memory
    are those of full training, and Adam starts on the group with warm moments. To save time and memory too, run stages
    with ``train_only``, at one compilation each.

    Args:
        model: the model to train.
        every: updates between two groups (ULMFiT: one epoch).
        groups: how depth is counted: see ``depths``.
        rates: each leaf's rate once it trains, for example from ``layerwise``; by default 1.

    Raises:
        ValueError: ``every`` is below 1; or as ``depths`` does.
        RuleError: as ``depths`` does.
    """
    if every < 1:
        raise InputError(f"every must be at least 1 update, got {every}")
    depth = depths(model, groups)
    top = max(jax.tree.leaves(depth))
    rates = train_all(model) if rates is None else rates
    return jax.tree.map(lambda d, rate: rate if d == top else Since((top - d) * every, rate), depth, rates)


_NUMBERED = re.compile(r"(?:layers?|blocks?|stages?|groups?)_?(\d+)(?:_(\d+))?")
_INPUT = re.compile(r"embed|patch|stem|token|position")


def depths(model: Model, groups: Sequence[str] | None = None) -> PyTree:
    """The depth of each leaf: 0 at the input, largest at the head.

    By default depth is read from the paths. The numbered layers (``layer_3``, ``block_3``, ``stage_1/block_0``) follow
    in order. Input embeddings (outside the layers, a name with ``embed``, ``patch``, ``stem``, ``token`` or
    ``position``) lie below them. Everything else (final norm, pooler) belongs to the last layer. Heads added by
    ``jtl.heads`` are the top. The layers of a ``decoder`` follow those of its ``encoder``, as in Whisper. The layers
    of the towers ``text`` and ``vision`` stand side by side, as in CLIP: both end at the same depth.

    Args:
        model: any model.
        groups: a regex of whole paths for each depth, input first; the first match wins.

    Raises:
        RuleError: a leaf is in no group, or a group matches no leaf.
        ValueError: without ``groups``, the paths show no single stack of numbered layers.

    >>> from jtl.wrap import function
    >>> leaves = {"embeddings": 1.0, "layer_0": 1.0, "layer_1": 1.0, "norm": 1.0}
    >>> depths(function(lambda params: params, leaves))
    {'embeddings': 0, 'layer_0': 1, 'layer_1': 2, 'norm': 2}
    >>> depths(function(lambda params: params, {"a": 1.0, "b": 1.0}), groups=["b", "a"])
    {'a': 1, 'b': 0}
    """
    if groups is not None:
        return tree.assign([(pattern, depth) for depth, pattern in enumerate(groups)], model.params)
    heads = {technique.name for technique in model.techniques if isinstance(technique, Head)}
    paths = list(tree.flatten(model.params))
    places = {path: _place(path) for path in paths if path.split("/")[0] not in heads}
    stacks = {place[0] for place in places.values() if place}
    towers = {stack.split("/")[0]: stack for stack in stacks}
    if len(stacks) == 2 and set(towers) == {"text", "vision"}:
        return _side_by_side(model, places)
    if len(stacks) != 1 and stacks != {"encoder", "decoder"}:
        found = (
            f"numbered layers under {sorted(stacks)}" if stacks else f"no numbered layers in {paths[:3]}..."
        )
        raise InputError(
            f"cannot tell depth from the paths: {found}; pass groups=[regex of the deepest, ..., 'head/.*']"
        )
    order = sorted({place for place in places.values() if place}, key=lambda p: (p[0] == "decoder", p[1]))
    last = {stack: 1 + max(i for i, place in enumerate(order) if place[0] == stack) for stack in stacks}

    def depth(path: str, _: object) -> int:
        if path not in places:
            return len(order) + 1
        if place := places[path]:
            return 1 + order.index(place)
        return 0 if _INPUT.search(path) else last.get(path.split("/")[0], len(order))

    found_depths = tree.map_with_path(depth, model.params)
    lowest = min(jax.tree.leaves(found_depths))
    return jax.tree.map(lambda d: d - lowest, found_depths)


def _side_by_side(model: Model, places: dict[str, tuple[str, tuple[int, ...]] | None]) -> PyTree:
    """The depths of a two-tower model; leaves outside both towers belong to their last layers."""
    numbers: dict[str, list[tuple[int, ...]]] = {}
    for place in places.values():
        if place:
            numbers.setdefault(place[0].split("/")[0], []).append(place[1])
    orders = {tower: sorted({*found}) for tower, found in numbers.items()}
    top = max(map(len, orders.values()))

    def depth(path: str, _: object) -> int:
        if path not in places:
            return top + 1
        tower = path.split("/")[0]
        if place := places[path]:
            return top - len(orders[tower]) + 1 + orders[tower].index(place[1])
        return top - len(orders[tower]) if tower in orders and _INPUT.search(path) else top

    return tree.map_with_path(depth, model.params)


def _place(path: str) -> tuple[str, tuple[int, ...]] | None:
    """The stack a path lies in and its number there: ``stage_1/block_0/conv`` is at ("", (1, 0))."""
    names = path.split("/")
    first = next((i for i, name in enumerate(names) if _NUMBERED.fullmatch(name)), None)
    if first is None:
        return None
    numbers: list[int] = []
    for name in names[first:]:
        match = _NUMBERED.fullmatch(name)
        if not match:
            break
        numbers += [int(number) for number in match.groups() if number]
    return "/".join(names[:first]), tuple(numbers)
