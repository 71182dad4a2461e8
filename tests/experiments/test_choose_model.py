"""``choose_model`` for real, as short as ``--quick`` makes it."""

import pytest
from short_runs import means, run

from experiments import choose_model

pytestmark = pytest.mark.slow


def test_choose_model(tmp_path):
    result = run(choose_model, tmp_path)
    assert all(-1 <= tau <= 1 for tau in means(result, "weighted_tau").values())
    rows = {row["arm"]: row for row in result.rows}
    for score in ("logme", "leep", "nce"):  # the pretrained layers are chosen before random ones
        assert rows["minilm:3"][score] > rows["minilm:random"][score], score
