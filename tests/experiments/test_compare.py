"""``compare`` for real, as short as ``--quick`` and two layers make it."""

import pytest
from short_runs import means, run

from experiments import compare

pytestmark = pytest.mark.slow


def test_compare(tmp_path, short_minilm):
    result = run(compare, tmp_path, text_model=short_minilm)
    assert list(means(result, "accuracy_text_64")) == [
        "majority",
        "probe",
        "scratch",
        "head",
        "lp_ft",
        "full",
    ]
    # A fair comparison: the same architecture and updates, but for the head, which is cheap on cached features.
    flops = means(result, "flops_per_example_text_64")
    assert 1000 * flops["head"] < flops["full"] == pytest.approx(flops["scratch"], rel=0.01)
    steps = {row["arm"]: row["steps"] for row in result.rows}
    assert steps["scratch"] == steps["lp_ft"] == steps["full"] == steps["head"] / 10
    for row in result.rows:
        assert row["arm"] in ("majority", "probe") or row["gap"] == row["train_accuracy"] - row["accuracy"]
    assert "The promises" in (tmp_path / "report.md").read_text()
    again = run(
        compare, tmp_path, resume=True, text_model=short_minilm
    )  # a killed run goes on with what it has measured
    assert again.rows == result.rows and again.summary == result.summary
