"""``benchmarks.maml`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import means, run

from experiments.benchmarks import maml

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def test_bench_maml(tmp_path):
    result = run(maml, tmp_path)
    assert set(result.summary["step_ratio"]) == {"functional_torch", "loop_torch"}
    assert max(means(result, "gradient_difference").values()) < 3e-2
    memory = means(result, "memory")
    assert memory["remat_5"] < memory["kept_5"] < memory["vmap_5"]
    # What remat adds by inner steps is their parameters; what keeping adds, their forwards.
    assert memory["remat_5"] - memory["remat_1"] < (memory["kept_5"] - memory["kept_1"]) / 2
