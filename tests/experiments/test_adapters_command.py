"""``adapters`` for real, as short as ``--quick`` and two layers make it."""

import pytest
from short_runs import means, run

from experiments import adapters

pytestmark = pytest.mark.slow


def test_adapters(tmp_path, short_minilm):
    result = run(adapters, tmp_path, text_model=short_minilm)
    parameters, memory = means(result, "trained_parameters_text"), means(result, "peak_memory_text")
    assert parameters["ia3"] < parameters["lora"] < 1e6 and set(memory) == {"ia3", "lora"}
    accuracy = means(result, "accuracy_text")
    assert (
        set(accuracy) == {"lora", "ia3", "probe"} and min(accuracy.values()) > 0.5
    )  # of two classes, balanced
    # Little is trained in ten updates, so that little of the other task can be lost.
    assert all(abs(lost) < 0.2 for lost in means(result, "forgetting_text").values())
