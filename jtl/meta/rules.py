"""Learned inner update rules: Meta-SGD, per-step rates and Meta-Curvature.

What a rule learns is in the model's tree, under ``params["inner"]``, so it trains, saves and shards like any other
leaf: ``model = learn(model, MetaSGD(0.01))`` and then ``maml(steps=1, rate=MetaSGD(0.01))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.model import Model

LEAVES = "inner"


@runtime_checkable
class Rule(Protocol):
    """How an inner step updates one parameter, with leaves of its own that the outer loop trains."""

    def start(self, leaf: Array) -> dict[str, Array]:
        """Returns the rule's initial leaves for one parameter."""
        ...

    def move(self, own: dict[str, Array], gradient: Array, step: Int[Array, ""]) -> Array:
        """Returns what is added to the parameter, given the rule's leaves for it."""
        ...


@dataclass(frozen=True)
class MetaSGD:
    """Meta-SGD: φ ← φ − α ∘ ∇L with a learned rate for each entry, of either sign.

    Li et al. 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", https://arxiv.org/abs/1707.09835.

    Attributes:
        rate: the initial value of each α.
    """

    rate: float

    def start(self, leaf: Array) -> dict[str, Array]:
        """Returns α, of the leaf's shape."""
        return {"rate": jnp.full_like(leaf, self.rate)}

    def move(self, own: dict[str, Array], gradient: Array, step: Int[Array, ""]) -> Array:
        """Returns −α ∘ gradient."""
        return -own["rate"] * gradient


@dataclass(frozen=True)
class PerStep:
    """A learned rate for each leaf and each inner step (LSLR).

    Antoniou et al. 2019, "How to train your MAML", https://arxiv.org/abs/1810.09502. The paper's rates are per layer:
    kernel and bias share one. Here each leaf has its own. Steps after ``steps`` use the last rate.

    Attributes:
        rate: the initial value of each.
        steps: the number of inner steps.
    """

    rate: float
    steps: int

    def start(self, leaf: Array) -> dict[str, Array]:
        """Returns the rates, (steps,)."""
        return {"rates": jnp.full(self.steps, self.rate, leaf.dtype)}

    def move(self, own: dict[str, Array], gradient: Array, step: Int[Array, ""]) -> Array:
        """Returns −α[step] · gradient."""
        return -own["rates"][jnp.minimum(step, self.steps - 1)] * gradient


@dataclass(frozen=True)
class MetaCurvature:
    """Meta-Curvature: multiplies the gradient along each of its axes by a learned matrix, initially the identity.

    Park and Oliva 2019, "Meta-Curvature", https://arxiv.org/abs/1902.03356. A kernel (..., in, out) has M_in and
    M_out. A kernel with position axes before those, such as a convolution's, also has M_at over all positions
    together. A vector has only M_out; a scalar has none.

    Attributes:
        rate: α, which is not learned.
    """

    rate: float

    def start(self, leaf: Array) -> dict[str, Array]:
        """Returns the matrices, each an identity."""
        at, n, m = _axes(leaf)
        sizes = {"m_at": at, "m_in": n, "m_out": m}
        return {name: jnp.eye(size, dtype=leaf.dtype) for name, size in sizes.items() if size > 1}

    def move(self, own: dict[str, Array], gradient: Array, step: Int[Array, ""]) -> Array:
        """Returns −α · gradient ×₁ M_at ×₂ M_in ×₃ M_out."""
        moved = gradient.reshape(_axes(gradient))
        for name, product in (("m_at", "ap,pio->aio"), ("m_in", "ai,pio->pao"), ("m_out", "ao,pio->pia")):
            if name in own:
                moved = jnp.einsum(product, own[name], moved)
        return -self.rate * moved.reshape(gradient.shape)


def _axes(leaf: Array) -> tuple[int, int, int]:
    """The sizes of positions, in, out."""
    shape = (1, 1, *leaf.shape)
    return leaf.size // max(shape[-1] * shape[-2], 1), shape[-2], shape[-1]


def learn(model: Model, rule: Rule, where: str = ".*") -> Model:
    """Returns ``model`` with the leaves of ``rule`` for each parameter whose whole path matches ``where``.

    They lie under ``params["inner"]``, below the parameter's path, and replace those of an earlier rule. No forward
    reads them; ``maml(rate=rule)`` does.

    Raises:
        RuleError: no path matches.
    """
    params = {name: leaves for name, leaves in model.params.items() if name != LEAVES}
    chosen = tree.flatten(tree.partition(params, tree.matches(where, params))[0])
    own = {
        f"{LEAVES}/{path}/{name}": value
        for path, leaf in chosen.items()
        for name, value in rule.start(leaf).items()
    }
    return model.with_params(tree.overlay(params, tree.nest(own)))


def learned(rate: Any, params: PyTree, moving: PyTree) -> dict[str, dict[str, Array]]:
    """Returns the rule's leaves in ``params``, by the path of the parameter that they update.

    Raises:
        ValueError: a parameter of ``moving`` has none, or the tree has leaves of a rule and ``rate`` is not a rule.
    """
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in tree.flatten(params).items():
        top, _, below = path.partition("/")
        if top == LEAVES:
            owner, _, name = below.rpartition("/")
            found.setdefault(owner, {})[name] = leaf
    if not isinstance(rate, Rule):
        if found:
            raise InputError(
                f"the model has a rule's leaves under {LEAVES!r}, which rate={rate!r} does not read: pass the rule "
                "as rate, or remove them (jtl.tree.remove)"
            )
        return {}
    moved = tree.flatten(moving)
    shapes = {path: rule_shapes(rate.start(leaf)) for path, leaf in moved.items()}
    wrong = sorted(path for path, own in shapes.items() if rule_shapes(found.get(path, {})) != own)
    if wrong:
        raise InputError(
            f"{type(rate).__name__} has no leaves of its shapes at {LEAVES}/{wrong[0]} (and {len(wrong) - 1} more): "
            "add them by jtl.meta.learn(model, rule), and let the step train them"
        )
    return found


def rule_shapes(own: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a rule's leaves for one parameter."""
    return {name: jnp.shape(leaf) for name, leaf in own.items()}


def updates_of(
    rule: Rule, own: dict[str, dict[str, Array]], gradients: PyTree, step: Int[Array, ""]
) -> PyTree:
    """Returns what the rule adds to each parameter."""
    return tree.map_with_path(lambda path, g: rule.move(own.get(path, {}), g, step), gradients)
