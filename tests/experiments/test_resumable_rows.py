"""A comparison that was killed goes on where it was, and measures nothing twice."""

import pytest

from experiments.common.resumable_rows import FILE, ResumableRows


def measure(done, name):
    def run():
        done.append(name)
        return {"accuracy": 0.5, "best": float("nan")}, [{"step": 1, "loss": 2.0}]

    return run


def test_rows_are_measured_once(tmp_path):
    done = []
    rows = ResumableRows(tmp_path, resume=False)
    first = rows.get(measure(done, "a"), arm="full", seed=0)
    assert first == {"accuracy": 0.5, "best": None, "arm": "full", "seed": 0}
    assert rows.curves == [{"step": 1, "loss": 2.0, "arm": "full", "seed": 0}]

    again = ResumableRows(tmp_path, resume=True)
    assert again.get(measure(done, "a"), seed=0, arm="full") == first
    again.get(measure(done, "b"), arm="full", seed=1)
    assert done == ["a", "b"]
    assert [row["seed"] for row in again.rows] == [0, 1]
    assert again.seconds > rows.seconds > 0  # those of the first start too


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_a_line_is_no_row(tmp_path, cut):
    done = []
    for seed in range(2):
        ResumableRows(tmp_path, resume=True).get(measure(done, seed), seed=seed)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    again = ResumableRows(tmp_path, resume=True)
    for seed in range(2):
        again.get(measure(done, seed), seed=seed)
    assert done == [0, 1, 1]
    assert len(file.read_bytes().splitlines()) == 2


def test_without_resume_it_starts_anew(tmp_path):
    done = []
    for _ in range(2):
        ResumableRows(tmp_path, resume=False).get(measure(done, "a"), seed=0)
    assert done == ["a", "a"]
