"""``benchmarks.lora`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import means, run

from experiments.benchmarks import lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # PEFT's own
]


def test_bench_lora(tmp_path):
    result = run(lora, tmp_path)
    assert means(result, "flops_over_minimum")["lora"] <= 1.03
    assert means(result, "memory_ratio")["peft"] >= 1
    assert set(result.summary["step_ratio"]) == {"fixed", "rotten_tomatoes"}
