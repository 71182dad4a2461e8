"""The command line of an experiment: its flags, its errors and the table at the end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from experiments.common.settings import Config
from jtl._files import cache_dir
from jtl.report.report import Result, format_seconds, summary_rows

C = TypeVar("C", bound=Config)
P = TypeVar("P")
OURS = ("jtl", "experiments", "__main__")


def cli(run: Callable[[C], Result | None], config: type[C], args: Sequence[str] | None = None) -> None:
    """Read ``config`` from the command line, run, and print the summary and where the report lies.

    An input that jtl refuses ends in one line on stderr and exit code 2, a training that diverged with 1, Ctrl-C
    with 130. ``JTL_TRACEBACK=1`` shows the traceback instead.

    Args:
        run: the experiment; None where it has said all itself.
        config: its dataclass; the docstrings under its fields are the help of the flags.
        args: the words of the command line; left out, those of the process.
    """
    settings = parse(config, sys.modules[run.__module__], args)
    keep_compilations()
    with refusals():
        result = run(settings)
    if result is not None:
        show(result, Path(settings.out))


def parse(config: type[P], module: ModuleType, args: Sequence[str] | None = None) -> P:
    """``config`` from the command line, or one of a union of them, each a subcommand.

    Args:
        config: a dataclass, whose fields' docstrings are the help of the flags.
        module: where the command is, whose docstring is its help.
        args: the words of the command line; left out, those of the process.
    """
    import tyro

    return tyro.cli(
        config,
        args=args,
        description=(module.__doc__ or config.__doc__ or "").strip(),
        config=(tyro.conf.FlagCreatePairsOff,),
        prog=_program(module),
    )


@contextmanager
def refusals() -> Iterator[None]:
    """End the process with a line on stderr where jtl refuses the input, a training diverges, or Ctrl-C comes."""
    try:
        yield
    except (ValueError, LookupError, OSError) as error:
        if not is_refusal(error):
            raise
        _stop(error, 2)
    except FloatingPointError as error:
        _stop(error, 1)
    except KeyboardInterrupt as error:
        _stop(error, 130)


def _stop(error: BaseException, code: int) -> NoReturn:
    if os.environ.get("JTL_TRACEBACK") == "1":
        raise error
    print(f"error: {message(error)}", file=sys.stderr)
    raise SystemExit(code) from None


def keep_compilations() -> None:
    """Let JAX keep compiled programs on disk, so that a second run starts at once; its own setting goes first."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` is an answer to the user's input rather than a defect.

    jtl and the experiments refuse input by raising themselves; a ValueError from within JAX or NumPy is a defect,
    whose traceback is needed. An OSError (no such file, no permission, no network) always speaks of the input.
    """
    if isinstance(error, OSError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] in OURS


def message(error: BaseException) -> str:
    """The message of an error on one line; KeyError would quote it."""
    quoted = isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str)
    return " ".join(str(error.args[0] if quoted else error).split()) or type(error).__name__


def show(result: Result, out: Path) -> None:
    """Print the summary as a table, the time and the path of the report."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result.summary:
        header, rows = summary_rows(result.summary)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        console.print(f"{result.experiment}: mean ± 95 % interval")
        for columns in side_by_side(widths, console.width):
            table = Table()
            for place in columns:
                table.add_column(header[place], justify="right" if place else "left")
            for row in rows:
                table.add_row(*(row[place] for place in columns))
            console.print(table)
    console.print(f"Done in {format_seconds(result.seconds)}. Report: ", end="")
    console.print(out / "report.md", soft_wrap=True, highlight=False)


def side_by_side(widths: Sequence[int], limit: int) -> list[list[int]]:
    """The columns of as many tables as it takes for each to fit into ``limit`` characters, the first in every one.

    >>> side_by_side([5, 30, 30, 30], 80)
    [[0, 1, 2], [0, 3]]
    """
    border = 3  # a bar and two spaces
    tables: list[list[int]] = []
    for place in range(1, len(widths)):
        if not tables or 1 + sum(widths[p] + border for p in (*tables[-1], place)) > limit:
            tables.append([0])
        tables[-1].append(place)
    return tables


def _program(module: object) -> str | None:
    spec = getattr(module, "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else None
