"""Runs that are killed with SIGKILL and resumed end in the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "digits_task.py"
ROOT = SCRIPT.parents[2]


def start(folder, result, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(result.parent / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, str(SCRIPT), str(folder), str(result), *flags]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("step_*"))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def bits(path):
    with np.load(path) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


@pytest.mark.slow
def test_killed_at_any_moment_then_resumed(tmp_path):
    finish(start(tmp_path / "whole", tmp_path / "whole.npz"))
    folder, result = tmp_path / "killed", tmp_path / "killed.npz"

    # In the very first save, before any checkpoint is complete: the next run starts again.
    finish(start(folder, result, "--die", "write_file", "1"), -signal.SIGKILL)
    assert checkpoints(folder) == [] and len(list(folder.glob("partial-*"))) == 1
    # In a save, after the arrays and before the manifest.
    errors = finish(start(folder, result, "--resume", "--die", "_hashes", "2"), -signal.SIGKILL)
    assert "partial-step_00000006 was only half written" in errors
    assert checkpoints(folder) == ["step_00000006"]
    # From outside, at a random moment of steps and saves.
    process = start(folder, result, "--resume", "--seconds", "0.03")
    wait_for(lambda: len(checkpoints(folder)) > 1, process)
    time.sleep(random.random())
    process.kill()
    assert "step_00000006" in finish(process, -signal.SIGKILL)
    # From outside, during a save.
    before = checkpoints(folder)
    process = start(folder, result, "--resume", "--seconds", "0.01")
    wait_for(lambda: checkpoints(folder) != before and list(folder.glob("partial-*")), process)
    process.kill()
    finish(process, -signal.SIGKILL)
    # While an old checkpoint is being deleted, which must not look like a corrupted one.
    finish(start(folder, result, "--resume", "--die", "rmtree", "2"), -signal.SIGKILL)

    assert not result.exists()
    errors = finish(start(folder, result, "--resume"))
    assert "resumed from" in errors and "corrupted" not in errors
    assert checkpoints(folder) == ["step_00000054", "step_00000060"]
    assert list(folder.glob("partial-*")) == []
    expected, found = bits(tmp_path / "whole.npz"), bits(result)
    assert len(expected) > 20 and [n for n in expected if expected[n] != found.get(n)] == []
