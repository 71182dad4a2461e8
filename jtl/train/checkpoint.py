"""Checkpoints that survive a kill at any moment and are verified before use.

A checkpoint is a folder such as ``step_00000120``:

* ``arrays/``: in Orbax's format, the trained parameters, other collections, optimiser state, step, random key, and the
  best parameters so far (under ``best/``);
* ``loader-0.json``: the position of each process's loader;
* ``run.json``: the progress, the shape of every array, and a fingerprint of every frozen leaf;
* ``manifest.json``: the SHA-256 of every other file.

It is written under another name, manifest last, and then renamed, so it is either complete or absent. Frozen leaves
are not stored: they are loaded again from the pretrained source, and the fingerprints verify that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import tree
from jtl._files import write_file
from jtl.errors import InputError
from jtl.train.step import TrainState

FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL, _OLD = "partial-", "deleted-"
_log = logging.getLogger(__name__)


class CheckpointError(InputError):
    """A folder of checkpoints is unusable, or does not belong to this run; the message says why and what to do."""


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint.

    Attributes:
        state: the train state, on the devices of the template it was restored for.
        best: ``{"trained": ..., "collections": ...}`` of the best validation, or None.
        loader: the loader's state (JSON).
        progress: the training loop's own state (JSON).
        path: the folder.
    """

    state: TrainState
    best: dict[str, PyTree] | None
    loader: Any
    progress: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run in one local (or shared) folder.

    Args:
        folder: created if missing.
        keep: how many to keep; older ones are deleted. Surviving a corrupted one takes at least two. Every checkpoint
            holds the best parameters.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = Path(folder).absolute(), keep
        self._frozen: tuple[Any, dict[str, str]] | None = None

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, oldest first, without verifying them."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``."""
        return self.folder / f"step_{step:08d}"

    def open(self, template: TrainState, *, resume: bool) -> Saved | None:
        """Before training, return the checkpoint to resume from, or None to start from ``template``.

        Args:
            template: the state of a fresh run.
            resume: whether to resume; without checkpoints the run starts from step 0.

        Raises:
            CheckpointError: the folder is not writable; it holds checkpoints and ``resume`` is false; none of them is
                usable; or they belong to another model, optimiser or frozen part.
        """
        _writable(self.folder)
        if resume:
            saved = self.restore(template)
            if saved is None:
                _log.warning("no checkpoint in %s yet: starting from step 0", self.folder)
            return saved
        if self.steps():
            raise CheckpointError(
                f"{self.folder} holds checkpoints already (steps {self.steps()}): resume from them "
                "(resume=True, --resume) or choose another folder"
            )
        return None

    def save(
        self, state: TrainState, *, best: dict[str, PyTree] | None, loader: Any, progress: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of ``state.step``, then delete all but the last ``keep``.

        All processes of a run must call this together.

        Args:
            state: the train state.
            best: the best parameters so far, or None.
            loader: the loader's state (JSON).
            progress: the training loop's own state (JSON).

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: a trained leaf is not finite; nothing is written.
        """
        import orbax.checkpoint as ocp

        if broken := not_finite(state.trained):
            raise CheckpointError(f"not saved: the trained leaves {broken[:5]} are not finite")
        step = int(state.step)
        final, partial = self.path(step), self.folder / f"{_PARTIAL}{self.path(step).name}"
        arrays = _arrays(state, best)
        if _primary():
            self._sweep()
            partial.mkdir(parents=True)
        _sync("jtl: checkpoint begins")
        # Weights hardly compress; uncompressed zarr3 is four times faster than Orbax's default.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "arrays", args=ocp.args.PyTreeSave(arrays))
        write_file(partial / f"loader-{jax.process_index()}.json", json.dumps(loader))
        frozen = self._fingerprint(state)
        _sync("jtl: checkpoint is written")
        if _primary():
            shapes = {path: _describe(array) for path, array in arrays.items()}
            run = {"format": FORMAT, "step": step, "arrays": shapes, "frozen": frozen, "progress": progress}
            write_file(partial / "run.json", json.dumps(run))
            write_file(partial / "manifest.json", json.dumps(_hashes(partial)))
            self._delete(final)
            os.replace(partial, final)
            for old in self.steps():
                if old > step or old not in [s for s in self.steps() if s <= step][-self.keep :]:
                    self._delete(self.path(old))
        _sync("jtl: checkpoint is committed")
        return final

    def restore(self, template: TrainState) -> Saved | None:
        """Return the newest intact checkpoint; None if none was ever completed.

        Arrays have the shapes, dtypes and shardings of ``template``, and its frozen leaves are kept. A partial or
        corrupted checkpoint is logged as a warning, and the one before it is tried.

        Raises:
            CheckpointError: every checkpoint is corrupted, or the newest intact one belongs to another run.
        """
        for partial in sorted(self.folder.glob(f"{_PARTIAL}*")):
            _log.warning("checkpoint %s was only half written when its run stopped: ignored", partial)
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            problem = damage(path)
            if problem is None:
                return self._load(path, template)
            _log.warning("checkpoint %s is corrupted (%s): trying the one before", path, problem)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is usable (steps {steps} are corrupted): "
                "delete the folder to start again"
            )
        return None

    def _load(self, path: Path, template: TrainState) -> Saved:
        import orbax.checkpoint as ocp

        run = json.loads((path / "run.json").read_text())
        if run["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {run['format']}; this version reads {FORMAT}")
        with_best = any(name.startswith("best/") for name in run["arrays"])
        best = {"trained": template.trained, "collections": template.collections} if with_best else None
        wanted = _arrays(template, best)
        _same(path, "trained part", run["arrays"], {name: _describe(x) for name, x in wanted.items()})
        _same(path, "frozen part", run["frozen"], self._fingerprint(template))
        loader = path / f"loader-{jax.process_index()}.json"
        if not loader.exists():
            raise CheckpointError(f"{path} is of a run with fewer processes: {loader.name} is missing")

        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()
        }
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
            arrays = checkpointer.restore(path / "arrays", args=args)

        def fill(prefix: str, like: PyTree) -> PyTree:
            return tree.map_with_path(lambda name, leaf: _like(arrays[prefix + name], leaf), like)

        state = fill("", template.replace(frozen=None)).replace(frozen=template.frozen)
        best = None if best is None else fill("best/", best)
        return Saved(state, best, json.loads(loader.read_text()), run["progress"], path)

    def _fingerprint(self, state: TrainState) -> dict[str, str]:
        assert state.frozen is not None
        # The frozen part never changes within a run, so it is hashed once.
        if self._frozen is None or self._frozen[0] is not state.frozen:
            self._frozen = (state.frozen, fingerprint(state.frozen.params))
        return self._frozen[1]

    def _delete(self, path: Path) -> None:
        # Renamed first: a kill midway must not leave a checkpoint that looks corrupted.
        if path.exists():
            doomed = path.with_name(_OLD + path.name)
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed)

    def _sweep(self) -> None:
        for prefix in (_PARTIAL, _OLD):
            for left in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(left)


def damage(path: Path) -> str | None:
    """Verify a checkpoint's files against its manifest: return what is wrong, or None if it is intact."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != expected:
                return f"{name} does not have the SHA-256 that manifest.json gives"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None if "run.json" in manifest else "manifest.json lists no run.json"


def fingerprint(params: PyTree) -> dict[str, str]:
    """Return the dtype, shape and content hash of every leaf, by path."""
    return {path: f"{_describe(x)} {_digest(x)}" for path, x in tree.flatten(params).items()}


def not_finite(params: PyTree) -> list[str]:
    """Return the paths of the leaves that hold NaN or infinity."""
    good = jax.device_get(_finite(params))
    return [path for path, ok in tree.flatten(good).items() if not ok]


@jax.jit
def _finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: TrainState, best: dict[str, PyTree] | None) -> dict[str, jax.Array]:
    leaves = tree.flatten(state.replace(frozen=None))
    leaves |= {f"best/{path}": leaf for path, leaf in tree.flatten(best).items()}
    return {p: jax.random.key_data(x) if _is_key(x) else jnp.asarray(x) for p, x in leaves.items()}


def _like(array: jax.Array, leaf: Any) -> jax.Array:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array


def _describe(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _digest(x: Any) -> str:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    content = np.ascontiguousarray(jax.random.key_data(x) if _is_key(x) else x)
    return hashlib.sha256(content.reshape(-1).view(np.uint8).data).hexdigest()[:16]


def _same(path: Path, part: str, found: dict[str, str], expected: dict[str, str]) -> None:
    wrong = [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here"
        for name in [*found, *(name for name in expected if name not in found)]
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} is of another run: its {part} differs in {len(wrong)} leaves: {'; '.join(wrong[:5])}"
            f"{'; ...' if len(wrong) > 5 else ''}. Resume with the model, data and flags that it was made with"
        )


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints to {folder}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _primary() -> bool:
    return jax.process_index() == 0


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
