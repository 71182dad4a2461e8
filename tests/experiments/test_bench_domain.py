"""``benchmarks.domain`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import means, run

from experiments.benchmarks import domain

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def test_bench_domain(tmp_path):
    pytest.importorskip("skada")
    result = run(domain, tmp_path)
    assert set(result.summary["step_ratio"]) == {"skada_dann", "skada_coral", "torch_dann", "torch_coral"}
    accuracy = means(result, "accuracy")
    assert set(accuracy) == {"jtl_dann", "skada_dann", "jtl_coral", "skada_coral"}
    assert min(accuracy["jtl_coral"], accuracy["skada_coral"]) > 0.3  # of ten classes
    for method in ("dann", "coral"):
        assert means(result, "loss_difference")[method] < 1e-4
        assert means(result, "gradient_difference")[method] < 1e-3
