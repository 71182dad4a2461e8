import pytest

from experiments.meta_sinusoid import MetaSinusoid, run

pytestmark = pytest.mark.slow


def test_meta_sinusoid(tmp_path):
    result = run(MetaSinusoid(out=tmp_path, quick=True))
    mse = result.summary["mse"]
    assert [row["seed"] for row in result.rows] == [0] * 6 and mse["maml_1"]["n"] == 1
    assert all(0 < row["ci95_over_tasks"] < row["mse"] for row in result.rows)
    assert 2 * mse["maml_1"]["mean"] < mse["pretrained_1"]["mean"]
    assert mse["maml_10"]["mean"] < mse["maml_1"]["mean"] < mse["maml_0"]["mean"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "error_by_inner_steps.png",
        "fits_of_one_task.png",
    }
    again = run(MetaSinusoid(out=tmp_path, quick=True, resume=True)).summary["mse"]
    assert again == mse
    with pytest.raises(ValueError, match="multiple of 500, got 10"):
        run(MetaSinusoid(out=tmp_path / "other", iterations=10))
