"""Rows of a long comparison, kept on disk as they come, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jtl.report.result import plain

FILE = "rows.jsonl"


class ResumableRows:
    """The finished arms of a run in ``folder``; each is stored once, whole, with its learning curve.

    Attributes:
        rows: a dict for each finished arm, in the order of the run.
        curves: the rows of their learning curves, each with the keys of its arm.
        seconds: wall time of these arms, over all starts of the run.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self._path = folder / FILE
        self._done: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []
        self.seconds = 0.0
        if resume and self._path.exists():
            whole = self._path.read_bytes().split(b"\n")[:-1]  # what a killed run left of a line is no row
            for line in whole:
                entry = json.loads(line)
                self._done[_name(entry["key"])] = entry
            self._path.write_bytes(b"".join(line + b"\n" for line in whole))
        elif self._path.exists():
            self._path.unlink()

    def get(
        self, run: Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]], **key: Any
    ) -> dict[str, Any]:
        """The row of ``key``: from disk, or from ``run() -> (row, curve)``, which is then stored."""
        name = _name(key)
        if name not in self._done:
            began = time.monotonic()
            row, curve = plain(run())
            entry = {"key": key, "row": row, "curve": curve, "seconds": time.monotonic() - began}
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._done[name] = entry
        entry = self._done[name]
        self.rows.append({**entry["row"], **key})
        self.curves += [{**point, **key} for point in entry["curve"]]
        self.seconds += entry["seconds"]
        return self.rows[-1]


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
