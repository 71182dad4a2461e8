"""Word error rates, against jiwer."""

import jiwer
import numpy as np
import pytest

from jtl.tasks import word_error_rate


@pytest.mark.parametrize("seed", range(30))
def test_rates_of_jiwer(seed):
    """Texts of few different words, so that there are many ways to turn one into the other; some empty."""
    rng = np.random.default_rng(seed)

    def texts(least):
        return [" ".join(rng.choice(list("abcd"), rng.integers(least, 12))) for _ in range(4)]

    said, written = texts(1), texts(0)
    assert word_error_rate(said, written) == pytest.approx(jiwer.wer(said, written))
    assert word_error_rate(said, said) == 0


def test_what_is_no_rate():
    assert word_error_rate(["a"], ["b c d"]) == 3
    with pytest.raises(ValueError, match="got 2 texts and 1"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing was said"):
        word_error_rate(["", " "], ["a", "b"])
