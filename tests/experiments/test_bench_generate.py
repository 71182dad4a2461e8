"""``benchmarks.generate`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import means, run

from experiments.benchmarks import generate

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def test_bench_generate(tmp_path, short_smollm2):
    result = run(generate, tmp_path, model=short_smollm2)
    assert means(result, "same_tokens")["one_text"] == 1  # 16 tokens are too few for a near tie
    assert set(result.summary["token_ratio"]) == {"one_text", "batch"}
    assert {"jtl", "transformers"} == set(result.summary["tokens_per_second_batch"])
    with pytest.raises(ValueError, match="reviews are as long"):
        run(generate, tmp_path / "long", model=short_smollm2, prompt_tokens=500)
