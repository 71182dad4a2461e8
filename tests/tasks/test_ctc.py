"""CTC: against the sum over all alignments, and torch's loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.tasks import CTC, ctc
from jtl.wrap import function

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]) != 0
LABELS = np.array([[1, 2, 3], [2, -1, -1], [3, 3, -1]])


def loss(labels, logits=LOGITS, mask=MASK, **batch):
    """That of a model whose parameters are its logits."""
    model = function(
        lambda params, mask: {"token_logits": params["logits"], "sequence_mask": mask}, {"logits": logits}
    )
    return CTC()(model, {"labels": labels, "mask": mask, **batch}, None)


def enumerated(logits, labels):
    """The same from the definition: all paths whose repeats and blanks removed leave the labels."""
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        collapsed = [token for token, _ in itertools.groupby(path) if token]
        if collapsed == list(labels):
            total += np.exp(sum(logp[t, token] for t, token in enumerate(path)))
    return -np.log(total) / len(labels)


def test_the_sum_over_all_alignments():
    rows = [enumerated(LOGITS[i][MASK[i]], [label for label in LABELS[i] if label >= 0]) for i in range(3)]
    value, aux = loss(LABELS)
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
    assert aux.metrics["labels"] == 6
    value, aux = loss(LABELS, weight=np.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(value, (rows[0] + rows[2]) / 2, rtol=1e-5)
    assert aux.metrics["labels"] == 5


def test_padding_is_not_seen():
    other = np.where(MASK[..., None], LOGITS, 9 * RNG.normal(size=LOGITS.shape)).astype(np.float32)
    np.testing.assert_allclose(loss(LABELS)[0], loss(LABELS, other)[0], rtol=1e-6)
    slope = jax.grad(lambda logits: loss(LABELS, logits)[0])(jnp.asarray(LOGITS))
    assert not np.asarray(slope)[~MASK].any() and np.asarray(slope)[MASK].any(1).all()


def test_impossible_and_unknown_labels():
    assert np.isinf(
        loss(np.array([[1, 2, 3], [2, 2, -1], [3, 3, 3]]))[0]
    )  # 4 frames for 3 labels and 2 blanks
    assert np.isfinite(
        loss(np.array([[1, 1, 1], [2, 2, -1], [3, -1, -1]]))[0]
    )  # 5 for 3 and 2, 3 for 2 and 1
    assert np.isnan(loss(np.array([[4, 2, 3], [2, -1, -1], [3, 3, -1]]))[0])


def test_decode():
    best = np.array([[0, 1, 1, 0, 1, 2], [3, 3, 0, 2, 2, 2]])
    logits = np.eye(4)[best]
    assert ctc.decode(logits) == [[1, 1, 2], [3, 2]]
    assert ctc.decode(logits, np.arange(6) < np.array([[4], [2]])) == [[1], [3]]
    assert ctc.decode(logits, blank=2) == [[0, 1, 0, 1], [3, 0]]


def test_errors():
    model = function(lambda params: params["w"], {"w": np.ones(3)})
    with pytest.raises(KeyError, match=r"which jtl.tasks.ctc.head adds; the model gives \['features'\]"):
        CTC()(model, {"labels": LABELS}, None)
    with pytest.raises(ValueError, match="this model is Function"):
        ctc.head(model, 3, key=jax.random.key(0))


@pytest.mark.parity
def test_the_loss_of_torch():
    import torch

    logits = torch.tensor(LOGITS, requires_grad=True)
    lengths, counts = torch.tensor(MASK.sum(1)), torch.tensor((LABELS >= 0).sum(1))
    theirs = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), torch.tensor(np.maximum(LABELS, 0)), lengths, counts
    )
    theirs.backward()
    value, slope = jax.value_and_grad(lambda logits: loss(LABELS, logits)[0])(jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(slope, logits.grad.numpy(), atol=1e-5)
