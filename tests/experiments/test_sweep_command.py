"""``sweep`` for real, as short as ``--quick`` and two layers make it."""

import numpy as np
import pytest
from short_runs import means, run

from experiments import sweep

pytestmark = pytest.mark.slow


def test_sweep(tmp_path, short_minilm):
    result = run(sweep, tmp_path, model=short_minilm)
    ratio = means(result, "time_ratio")
    assert ratio["programs"] < 1 and ratio["programs"] < ratio["one_process"]
    text = (tmp_path / "report.md").read_text()
    furthest = float(text.split("differs by more than ")[1].split(" ")[0])
    assert furthest <= 0.02  # of 200 validation texts, in another order of sums
    tested = {row["learning_rate"] for row in result.rows if "accuracy" in row}
    validated = {
        rate: np.mean([row["validation_accuracy"] for row in result.rows if row["learning_rate"] == rate])
        for rate in {row["learning_rate"] for row in result.rows}
    }
    assert tested == {max(validated, key=validated.get)}
