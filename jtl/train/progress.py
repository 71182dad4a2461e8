"""Progress display of a run: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_EVERY = 10.0


class Display:
    """Progress of a run: loss, examples per second and remaining time.

    The bar needs ``rich``. Without it, or if the output is not a terminal, a line is printed every ten seconds.

    Args:
        start: updates done before this run started.
        steps: total number of updates.
        enabled: False shows nothing.
    """

    def __init__(self, start: int, steps: int, enabled: bool) -> None:
        self.start, self.steps, self.enabled = start, steps, enabled
        self._bar = _bar() if enabled else None
        self._first: tuple[float, int, int] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self.steps, completed=self.start, figures="compiling"
            )
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, examples: int) -> None:
        """Report that ``step`` updates on ``examples`` examples are done and the last one had this ``loss``."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._first is None:
            # The first step compiles, so speed is measured from its end.
            self._first = (now, step, examples)
        since, first_step, first_examples = self._first
        elapsed = max(now - since, 1e-9)
        speed = f"{(examples - first_examples) / elapsed:.0f} examples/s" if step > first_step else ""
        if self._bar:
            self._bar.update(self._task, completed=step, figures=f"loss {loss:.4f}  {speed}")
        elif now - self._printed >= LINE_EVERY or step == self.steps:
            self._printed = now
            left = elapsed / max(step - first_step, 1) * (self.steps - step)
            print(f"step {step}/{self.steps}  loss {loss:.4f}  {speed}  {left:.0f} s left", flush=True)

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.console.print(message, highlight=False, markup=False)
        else:
            print(message, file=sys.stderr, flush=True)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console()
    if not (console.is_terminal or console.is_jupyter):
        return None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    return Progress(*columns, console=console)
