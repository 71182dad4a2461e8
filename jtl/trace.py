"""Which modules a forward calls and which inputs it reads, found by tracing, without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.interpreters import partial_eval
from jaxtyping import PyTree

# A watcher of module calls: (module, path, first input, call) -> output, where call() runs the module.
Watcher = Callable[[nn.Module, str, Any, Callable[[], Any]], Any]


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Route every ``__call__`` of a Linen module in this context through ``watcher``.

    Scanned layers are traced twice, so a watcher sees their modules twice.
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        inputs = jax.tree.leaves((args, kwargs))
        first = inputs[0] if inputs else None
        return watcher(context.module, "/".join(context.module.path), first, lambda: call(*args, **kwargs))

    with nn.intercept_methods(intercept):
        yield


def watch(watcher: Watcher, function: Callable[..., Any], *args: Any) -> Any:
    """Return the shapes of ``function(*args)``, with every module call routed through ``watcher``."""

    def watched(*args: Any) -> Any:
        with watching(watcher):
            return function(*args)

    return jax.eval_shape(watched, *args)


def modules(function: Callable[..., Any], *args: Any) -> dict[str, type[nn.Module]]:
    """Return the Linen modules that ``function(*args)`` calls, by path: the names that taps and adapters can use."""
    kinds: dict[str, type[nn.Module]] = {}

    def watcher(module: nn.Module, path: str, x: Any, call: Callable[[], Any]) -> Any:
        kinds[path] = type(module)
        return call()

    watch(watcher, function, *args)
    return kinds


def reads(function: Callable[..., Any], *args: PyTree) -> tuple[PyTree, ...]:
    """For each leaf of ``args``, return whether any output of ``function(*args)`` depends on it.

    The function is traced to a jaxpr and dead code is removed.

    Returns:
        Booleans in the structure of each of ``args``.
    """
    closed = jax.make_jaxpr(function)(*args)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return jax.tree.unflatten(jax.tree.structure(args), used)
