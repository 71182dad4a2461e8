"""Atomic file writes, and the cache folder where jtl keeps what it downloads and computes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """Return jtl's cache folder: ``$JTL_CACHE`` if set, else the platform's user cache for "jtl"."""
    if folder := os.environ.get("JTL_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jtl"))


def write_file(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: under a temporary name in the same folder, then renamed.

    Args:
        path: the file to write; its folder must exist, and an existing file is replaced.
        content: text (stored as UTF-8), bytes, or a function that writes to the open file.

    Raises:
        OSError: the folder is missing or not writable.
    """
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        # mkstemp makes files readable by their owner only; a report should follow the user's umask.
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """Return the permission bits that this process withholds from new files."""
    mask = os.umask(0)  # it cannot be read without setting it
    os.umask(mask)
    return mask
