"""``tune`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import run

from experiments import tune

pytestmark = pytest.mark.slow


def test_tune(tmp_path):
    result = run(tune, tmp_path, model="efficientnet-lite0", data="uci_digits", image_size=32)
    assert {row["arm"] for row in result.rows} == {"loreft"}  # the last that images can have
    accuracy = {row["rate"]: row["validation_accuracy"] for row in result.rows}
    assert (
        len(accuracy) == 3
        and f"| loreft | {max(accuracy, key=accuracy.get):.2g} |" in (tmp_path / "report.md").read_text()
    )
