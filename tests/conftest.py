"""The rules of the test run: eight CPU devices, no rank promotion, warnings are errors, shapes are checked."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test workers compile at once
# Tests compile far more than they run. Without XLA's newer emitters of fused loops a convolution or a single operation
# compiles in half the time; LLVM at its first level saves a little more, at level 0 a Conv4 step gives NaN. Neither
# changes how fast a transformer runs. Your own flags come last, and win.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false "
    "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
).strip()

from jaxtyping import install_import_hook

_hook = install_import_hook("jtl", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from jtl import sharding  # noqa: E402
from jtl._files import cache_dir  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers and later runs share compilations.
jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


MAPS = Path("/proc/self/maps")  # Linux allows a process 65,530
MOST_MAPS = 10_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Forget earlier programs once they are many: each takes maps of memory, and with none left JAX crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def slice_2x2() -> Iterator[jax.sharding.Mesh]:
    """Four TPU chips to compile for, which need not be there: so no program for them is read back from the cache."""
    pytest.importorskip("libtpu", reason="pip install -r requirements-tpu.txt")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once in a process whether there is one
    yield sharding.make_mesh(topologies.get_topology_desc("v5e:2x2", "tpu").devices)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_terminal_summary(terminalreporter):
    """Print what tests noted under "memory", which a worker of xdist cannot."""
    noted = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "memory"
    ]
    if noted:
        terminalreporter.section("memory of compiled train steps")
        terminalreporter.write_line("\n".join(sorted(noted)))
