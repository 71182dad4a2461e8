"""The rules of the test run: eight CPU devices, no rank promotion, warnings are errors, shapes are checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test workers compile at once
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

_hook = install_import_hook("jtl", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from jtl.wheel import cache_dir  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers and later runs share compilations.
jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


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
