"""The losses beside torchdistill's on the same tensors: equal, or apart by what the paper says."""

import jax.numpy as jnp
import numpy as np
import pytest

from jtl import distill

pytestmark = pytest.mark.parity
B, C = 6, 5


@pytest.fixture(scope="module")
def mid_level():
    pytest.importorskip("torch")
    return pytest.importorskip("torchdistill.losses.mid_level")


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def theirs(loss, student, teacher, targets=None):
    import torch

    def moved(x):  # their maps have channels first
        return torch.tensor(np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else np.array(x))

    sides = [{name: {"output": moved(x)} for name, x in side.items()} for side in (student, teacher)]
    return float(loss(*sides, None if targets is None else torch.tensor(targets)))


def paths(**more):
    named = dict.fromkeys(("student_module_path", "teacher_module_path"), "x")
    return {**named, **dict.fromkeys(("student_module_io", "teacher_module_io"), "output"), **more}


LOGITS = drawn(0, B, C), 2 * drawn(1, B, C)
VECTORS = drawn(2, B, 7), drawn(3, B, 9)
MAPS = drawn(4, B, 5, 5, 3), drawn(5, B, 5, 5, 3)


def both(pair):
    return {"x": pair[0]}, {"x": pair[1]}


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets(mid_level, temperature):
    import torch

    label = np.arange(B) % C
    loss = mid_level.KDLoss(**paths(temperature=temperature, alpha=0.1))
    task = float(torch.nn.functional.cross_entropy(torch.tensor(np.array(LOGITS[0])), torch.tensor(label)))
    ours = 0.1 * task + 0.9 * float(distill.soft_targets(*LOGITS, temperature))
    np.testing.assert_allclose(ours, theirs(loss, *both(LOGITS), label), rtol=1e-5)
    # Without the hard loss theirs drops T².
    alone = theirs(mid_level.KDLoss(**paths(temperature=temperature, alpha=0.0)), *both(LOGITS), label)
    np.testing.assert_allclose(distill.soft_targets(*LOGITS, temperature), temperature**2 * alone, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist(mid_level, temperature):
    loss = mid_level.DISTLoss(**paths(tau=temperature, beta=2.0, gamma=0.5))
    ours = distill.dist(*LOGITS, temperature, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(ours, theirs(loss, *both(LOGITS)), rtol=1e-5)


@pytest.mark.parametrize(("mode", "factor"), [("code", 1.0), ("paper", 0.5)])
def test_attention_transfer(mid_level, mode, factor):
    """The paper's equation 2 has a half that theirs leaves out."""
    layer = {"path": "x", "io": "output"}
    loss = mid_level.ATLoss({"a": {"student": layer, "teacher": layer}}, mode=mode)
    ours = distill.attention_transfer(*MAPS, squared=mode == "code")
    np.testing.assert_allclose(ours, factor * theirs(loss, *both(MAPS)), rtol=1e-5)


def test_similarity(mid_level):
    """The paper's rows of products have Euclidean norm 1; in theirs their absolute values add up to 1."""
    found = theirs(mid_level.SPKDLoss("x", "x", "batchmean"), *both(VECTORS))

    def distance(order):
        products = [np.asarray(x @ x.T) for x in VECTORS]
        own, other = (g / np.linalg.norm(g, order, axis=1, keepdims=True) for g in products)
        return np.square(own - other).sum() / B**2

    np.testing.assert_allclose(found, distance(1), rtol=1e-5)
    np.testing.assert_allclose(distill.similarity(*VECTORS), distance(2), rtol=1e-5)


def test_hierarchical_context(mid_level):
    import torch

    loss = mid_level.HierarchicalContextLoss(**paths())
    own, other = (torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in MAPS)
    found = float(loss({"x": {"output": (own, None)}}, {"x": {"output": other}}))
    np.testing.assert_allclose(distill.hierarchical_context(*MAPS), found, rtol=1e-5)


def test_rkd(mid_level):
    """Theirs averages over all pairs and triples, whose repeated rows add nothing; ours over distinct rows."""
    distance, angle = (
        theirs(mid_level.RKDLoss("x", "x", *factors, "mean"), *both(VECTORS))
        for factors in ((1.0, 0.0), (0.0, 1.0))
    )
    np.testing.assert_allclose(distill.rkd_distance(*VECTORS), distance * B / (B - 1), rtol=1e-4)
    np.testing.assert_allclose(distill.rkd_angle(*VECTORS), angle * B**2 / ((B - 1) * (B - 2)), rtol=1e-4)


def test_pkt(mid_level):
    """The paper's probabilities are of the other rows; theirs count the row itself, and average over all pairs."""
    found = theirs(mid_level.PKTLoss(**paths()), *both(VECTORS))

    def divergence(itself):
        p, q = (_affinity(x, itself) for x in VECTORS[::-1])
        held = ~np.eye(B, dtype=bool) | itself
        return np.sum(p[held] * np.log(p[held] / q[held]))

    np.testing.assert_allclose(found, divergence(True) / B**2, rtol=1e-3)
    np.testing.assert_allclose(distill.pkt(*VECTORS), divergence(False) / B, rtol=1e-4)


def _affinity(x, itself):
    x = np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    p = (x @ x.T + 1) / 2
    p = p if itself else p * (1 - np.eye(B))
    return p / p.sum(1, keepdims=True)


def test_fsp(mid_level):
    """The paper squares the Frobenius norm; theirs sums the norms of the columns."""
    second = drawn(6, B, 5, 5, 4), drawn(7, B, 5, 5, 4)
    name = lambda path: {"path": path, "io": "output"}  # noqa: E731
    pair = {
        f"{side}_{place}": name(path)
        for side in ("student", "teacher")
        for place, path in (("first", "a"), ("second", "b"))
    }
    sides = [{"a": MAPS[i], "b": second[i]} for i in (0, 1)]
    found = theirs(mid_level.FSPLoss({"p": pair}), *sides)
    own, other = (np.einsum("bhwc,bhwe->bce", MAPS[i], second[i]) / 25 for i in (0, 1))
    np.testing.assert_allclose(found, np.linalg.norm(own - other, axis=1).sum() / B, rtol=1e-4)
    ours = distill.fsp((MAPS[0], second[0]), (MAPS[1], second[1]))
    np.testing.assert_allclose(ours, np.square(own - other).sum() / B, rtol=1e-4)
