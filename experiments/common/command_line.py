"""The command line of an experiment: its flags, its errors and the table at the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from experiments.common.settings import Config, check
from jtl._files import cache_dir
from jtl.errors import Diverged, UserError
from jtl.report.report import Result, format_seconds, summary_rows

C = TypeVar("C", bound=Config)
P = TypeVar("P")


def main(
    run: Callable[[C], Result | None],
    config: type[C],
    predict: Callable[[C], None] | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Read ``config`` from the command line, run, and print the summary and where the report lies.

    An input that jtl refuses ends in one line on stderr and exit code 2, a training that diverged with 1, Ctrl-C
    with 130. ``JTL_TRACEBACK=1`` shows the traceback instead.

    Args:
        run: the experiment; None where it has said all itself.
        config: its dataclass; the docstrings under its fields are the help of the flags.
        predict: what ``--predict`` does with the model that an earlier run left in ``--out``.
        args: the words of the command line; left out, those of the process.
    """
    settings = parse(config, run.__module__, args)
    keep_compilations()
    with refusals():
        check(settings)
        if predict is not None and getattr(settings, "predict", None) is not None:
            predict(settings)
            return
        result = run(settings)
    if result is not None:
        show(result, Path(settings.out))


def parse(config: type[P], module: str, args: Sequence[str] | None = None) -> P:
    """``config`` from the command line, or one of a union of them, each a subcommand.

    Args:
        config: a dataclass, whose fields' docstrings are the help of the flags.
        module: the name of the module that runs it; the docstring of the command, a file or a package, is its help.
        args: the words of the command line; left out, those of the process.
    """
    import tyro

    command = command_of(module)
    return tyro.cli(
        config,
        args=args,
        description=(sys.modules[command].__doc__ or config.__doc__ or "").strip(),
        config=(tyro.conf.FlagCreatePairsOff,),
        prog=f"python -m {_spoken(command)}",
    )


def command_of(module: str) -> str:
    """The module that ``python -m`` names: the package of a study in a folder, or the file itself.

    >>> command_of("experiments.art.study"), command_of("experiments.finetune")
    ('experiments.art', 'experiments.finetune')
    """
    package, _, name = module.rpartition(".")
    return package if name in ("study", "commands") else module


def _spoken(command: str) -> str:
    spec = getattr(sys.modules[command], "__spec__", None)  # of a file run by -m, whose module is __main__
    return spec.name if spec is not None else command


@contextmanager
def refusals() -> Iterator[None]:
    """End the process with a line on stderr where jtl refuses the input, a training diverges, or a signal stops it."""
    try:
        yield
    except (UserError, OSError) as error:  # no such file, no permission, no network: also about the input
        _stop(error, 2)
    except Diverged as error:
        _stop(error, 1)
    except KeyboardInterrupt as error:
        _stop(error, 128 + getattr(error, "signal", signal.SIGINT))  # as a shell has it


def _stop(error: BaseException, code: int) -> NoReturn:
    if os.environ.get("JTL_TRACEBACK") == "1":
        raise error
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    raise SystemExit(code) from None


def keep_compilations() -> None:
    """Let JAX keep compiled programs on disk, so that a second run starts at once; its own setting goes first."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


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
