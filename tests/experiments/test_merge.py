"""``merge`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import lines, means, run

from experiments import merge

pytestmark = pytest.mark.slow


def test_merge(tmp_path):
    result = run(merge, tmp_path)
    soup, tasks = means(result, "accuracy_soup"), means(result, "accuracy_tasks")
    assert {"member", "uniform_soup", "greedy_soup", "fisher", "slerp", "wise_ft"} <= set(soup)
    assert tasks["alone"] >= tasks["start"]
    # Along the line from the start to the best member: its end is that member, and wise_ft one of its points.
    line = {point["weight"]: point["accuracy"] for point in lines(tmp_path)[0]["curve"]}
    assert line[1.0] == pytest.approx(soup["best"], abs=0.02)
    assert min(abs(soup["wise_ft"] - accuracy) for accuracy in line.values()) <= 0.02
