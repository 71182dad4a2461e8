"""Files written whole or not at all, and the folder of what jtl keeps between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """Folder of what jtl keeps between runs: ``$JTL_CACHE``, else the platform's user cache for "jtl"."""
    if folder := os.environ.get("JTL_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jtl"))


def write_file(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write ``path`` whole or not at all: under another name in its folder first, then renamed.

    Args:
        path: in a folder that exists; a file of that name is replaced.
        content: text (stored as UTF-8), bytes, or a function that writes them to the open file.

    Raises OSError if the folder is missing or cannot be written to.
    """
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        # mkstemp makes files for their owner alone; a report is for those whom the user's umask admits.
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The permissions that this process withholds from new files."""
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
