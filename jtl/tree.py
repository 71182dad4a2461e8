"""Trees of parameters: paths, rules, selection, overlay, differences and arithmetic.

A path names a leaf: ``"encoder/layer_0/attention/query/kernel"``. A rule list is ``[(regex, value), ...]``: a regex
must match the whole path (``re.fullmatch``), and the first match wins. The same rules are used for freezing, learning
rates, regularisers, sharding and renaming. They never fail silently: a leaf that no rule covers and a rule that matches
no leaf both raise.

This is the only module that walks trees. It works on any pytree; ``overlay`` and ``nest`` return nested dicts, as
Flax uses them.
"""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from optax.tree import add, norm, scale, sub, vdot

from jtl.errors import InputError

__all__ = [
    "add", "norm", "scale", "sub", "vdot", "interpolate", "size",
    "flatten", "nest", "map_with_path", "near_misses",
    "Rules", "RuleError", "assign", "matches", "partition", "combine", "overlay", "remove", "diff", "fold_path",
]  # fmt: skip

Rules = Sequence[tuple[str, Any]]


class RuleError(InputError):
    """A rule list and a tree do not fit: a leaf has no rule, or a rule matches no leaf."""


# --- paths -----------------------------------------------------------------------------------------


def _path(key_path: Any) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of ``tree`` by path, in tree order. ``None`` is an absent leaf.

    >>> flatten({"a": {"b": 1, "c": [2, 3]}})
    {'a/b': 1, 'a/c/0': 2, 'a/c/1': 3}
    """
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Build nested dicts from leaves by path: the inverse of ``flatten`` for nested dicts.

    Raises:
        ValueError: one path is both a leaf and a branch.

    >>> nest({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{path!r} lies below {parent!r}, which is a leaf")
        if name in node:
            raise InputError(f"{path!r} is both a leaf and a branch")
        node[name] = leaf
    return root


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map ``fn(path, leaf, ...)`` over the leaves of ``tree`` (and of ``rest``, of the same structure)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_path(path), *leaves), tree, *rest)


def near_misses(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return the ``n`` known names closest to ``name``, best first, for error messages.

    >>> near_misses("encoder/layer_O", ["encoder/layer_0", "head"])
    ['encoder/layer_0']
    """
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.4)


def fold_path(key: Array, path: str) -> Array:
    """Return a random key for the leaf at ``path``: independent of other leaves and the same on every machine."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


# --- rules -----------------------------------------------------------------------------------------


def assign(rules: Rules, tree: PyTree) -> PyTree:
    """Return the tree of the values that ``rules`` assign to the leaves of ``tree``.

    Raises:
        RuleError: a leaf has no rule; a rule matches no leaf; or a rule is hidden, because earlier rules take every
            leaf it matches (a final ``".*"`` may be hidden). The message lists near misses.

    >>> assign([("head/.*", 1.0), (".*", 0.1)], {"body": {"w": 0}, "head": {"w": 0}})
    {'body': {'w': 0.1}, 'head': {'w': 1.0}}
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    paths = list(flatten(tree))
    winner = {
        path: next((i for i, (p, _) in enumerate(compiled) if p.fullmatch(path)), None) for path in paths
    }

    problems = []
    uncovered = [path for path in paths if winner[path] is None]
    if uncovered:
        shown = ", ".join(map(repr, uncovered[:5])) + (", ..." if len(uncovered) > 5 else "")
        problems.append(
            f"no rule covers {len(uncovered)} of {len(paths)} leaves: {shown}; end with ('.*', value)"
        )
    for i, (pattern, _) in enumerate(compiled):
        met = [path for path in paths if pattern.fullmatch(path)]
        if not met:
            problems.append(f"rule {pattern.pattern!r} meets no leaf{_hint(pattern, paths)}")
        elif i not in winner.values() and not (i == len(compiled) - 1 and pattern.pattern == ".*"):
            problems.append(
                f"rule {pattern.pattern!r} is hidden: earlier rules take all {len(met)} leaves it meets"
            )
    if problems:
        raise RuleError("; ".join(problems))
    return map_with_path(lambda path, _: compiled[winner[path]][1], tree)  # type: ignore[index]


def _hint(pattern: re.Pattern[str], paths: list[str]) -> str:
    inside = [path for path in paths if pattern.search(path)]
    if inside:
        return f" (rules match whole paths; '.*{pattern.pattern}.*' would meet {inside[0]!r})"
    names = {name for path in paths for name in path.split("/")}
    unknown = [
        word for word in re.findall(r"\w+", pattern.pattern) if not any(word in name for name in names)
    ]
    close = [name for word in unknown for name in near_misses(word, names)]
    if close:
        return f" (near misses: {', '.join(map(repr, close))})"
    return f" (a path looks like {paths[0]!r})" if paths else " (the tree has no leaf)"


def matches(pattern: str, tree: PyTree) -> PyTree:
    """Return a tree of booleans: whether ``pattern`` matches the whole path.

    Raises:
        RuleError: no path matches.

    >>> matches(".*/bias", {"a": {"bias": 0, "kernel": 0}})
    {'a': {'bias': True, 'kernel': False}}
    """
    return assign([(pattern, True), (".*", False)], tree)


# --- parts -----------------------------------------------------------------------------------------


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Split ``tree`` into two trees of its structure: the leaves where ``mask`` is true, and the others.

    Missing leaves are ``None``, which JAX does not treat as a leaf, so gradients and optimisers skip them.
    """
    return (
        jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, mask),
        jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask),
    )


def combine(first: PyTree, second: PyTree) -> PyTree:
    """Merge two trees, the inverse of ``partition``: each leaf comes from the tree that has it."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def overlay(tree: Mapping[str, Any], extra: Mapping[str, Any], *, replace: bool = False) -> dict[str, Any]:
    """Return nested dicts ``tree`` with the leaves of ``extra`` added.

    Args:
        tree: nested dicts.
        extra: nested dicts of the leaves to add.
        replace: whether leaves of ``extra`` may replace those of ``tree``.

    Raises:
        ValueError: a leaf exists already and ``replace`` is false.

    >>> overlay({"a": {"b": 1}}, {"a": {"c": 2}})
    {'a': {'b': 1, 'c': 2}}
    """
    leaves, new = flatten(tree), flatten(extra)
    clash = [] if replace else sorted(leaves.keys() & new.keys())
    if clash:
        raise InputError(
            f"leaves exist already: {', '.join(map(repr, clash[:5]))}; pass replace=True to replace them"
        )
    return nest({**leaves, **new})


def remove(pattern: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts without the leaves whose whole path matches ``pattern``.

    Raises:
        RuleError: no path matches.
    """
    mask = flatten(matches(pattern, tree))
    return nest({path: leaf for path, leaf in flatten(tree).items() if not mask[path]})


def diff(before: PyTree, after: PyTree) -> list[str]:
    """List differences in paths, shapes and dtypes, one per line: ``+`` added, ``-`` removed, ``~`` changed.

    >>> diff({"a": jnp.zeros(2)}, {"a": jnp.zeros(3), "b": jnp.zeros(1)})
    ['~ a: float32[2] -> float32[3]', '+ b: float32[1]']
    """
    old, new = ({path: _describe(leaf) for path, leaf in flatten(tree).items()} for tree in (before, after))
    changed = [
        f"~ {path}: {old[path]} -> {new[path]}" for path in old if path in new and old[path] != new[path]
    ]
    gone = [f"- {path}: {old[path]}" for path in old if path not in new]
    return changed + gone + [f"+ {path}: {new[path]}" for path in new if path not in old]


def _describe(leaf: Any) -> str:
    shape = ",".join(map(str, np.shape(leaf)))
    return f"{jnp.result_type(leaf)}[{shape}]"


# --- arithmetic (the rest is optax.tree) -----------------------------------------------------------


def interpolate(start: PyTree, end: PyTree, weight: Any) -> PyTree:
    """``(1 - weight) * start + weight * end``, leaf by leaf."""
    return jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, start, end)


def size(tree: PyTree) -> int:
    """Return the number of scalars in all leaves."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))
