"""SpecAugment: what is hidden, by what, and how much of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.data import spec_augment

B, T, M = 600, 60, 20
SOUNDS = np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32)
augment = jax.jit(spec_augment, static_argnames=("frequency", "frequencies", "time", "times", "share"))


def hidden(**settings):
    """Where something else stands, of which each row's mean must be all."""
    found = np.asarray(augment(SOUNDS, jax.random.key(0), **settings))
    where = found != SOUNDS
    lengths = settings.get("lengths", np.full(B, T))
    means = np.array([row[:n].mean() for row, n in zip(SOUNDS, lengths, strict=True)])
    np.testing.assert_allclose(
        found[where], np.broadcast_to(means[:, None, None], found.shape)[where], atol=1e-5
    )
    return where


def spans(covered):
    """How many runs there are in each row, and their widths."""
    edges = np.diff(np.pad(covered.astype(int), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return np.bincount(starts[:, 0], minlength=len(covered)), ends[:, 1] - starts[:, 1], starts[:, 1]


def test_bands():
    where = hidden(frequency=7, frequencies=1, times=0)
    assert (where == where[:, :1]).all()  # whole bands
    count, width, start = spans(where[:, 0])
    assert count.max() == 1 and set(width) == set(range(1, 8)) and (start + width).max() <= M
    # Each of the eight widths, 0 among them, has an eighth of the rows, give or take four deviations.
    shares = np.bincount(where[:, 0].sum(1), minlength=8) / B
    assert np.abs(shares - 1 / 8).max() < 4 * (0.125 * 0.875 / B) ** 0.5
    assert (
        where[:, 0].any(0)[: M - 1].all()
    )  # any band can be, but the last, where none begins (the paper's [0, v - f))


def test_stretches_of_time():
    where = hidden(frequency=0, time=11, times=3)
    assert (where == where[..., :1]).all()
    count, width, _ = spans(where[..., 0])
    assert count.max() == 3 and width.max() > 11  # three, which may touch
    assert where[..., 0].sum(1).max() <= 33
    assert spans(hidden(frequency=0, time=50, times=1, share=0.1)[..., 0])[1].max() == 6  # a tenth of 60


def test_padding_stays():
    lengths = np.random.default_rng(1).integers(1, T + 1, B)
    where = hidden(frequency=5, time=30, share=0.5, lengths=lengths)
    assert not where[np.arange(T)[None] >= lengths[:, None]].any()
    count, width, _ = spans(hidden(frequency=0, time=30, times=1, share=0.5, lengths=lengths)[..., 0])
    rows = np.repeat(np.arange(B), count)
    assert (width <= 0.5 * lengths[rows]).all() and width.max() > 20


def test_keys_and_nothing_to_hide():
    first, second = (augment(SOUNDS, jax.random.key(i), frequency=5) for i in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(augment(SOUNDS, jax.random.key(0), frequency=0, time=0), SOUNDS)
    low = augment(jnp.asarray(SOUNDS, jnp.bfloat16), jax.random.key(0), frequency=5)
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("settings", [{"frequency": 21}, {"frequency": -1}, {"share": 0.0}, {"share": 1.5}])
def test_settings_that_mean_nothing(settings):
    with pytest.raises(ValueError, match="frequency is 0 to the 20 bands and share in"):
        spec_augment(SOUNDS, jax.random.key(0), **{"frequency": 5, **settings})
