"""Every architecture under every kind of technique, by paths and rules alone: a real step for each of them.

The architectures are those of the library's own table, so that a new one joins by itself: with the committed reference
of its tests, or with a tiny configuration in TINY. All are slow together: a hundred programs to compile.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import REFERENCES, read
from support import error, from_files

from jtl import adapters, distill, finetune, heads, tree
from jtl.loss import Aux
from jtl.model import Model, modules, with_base
from jtl.models import ARCHITECTURES
from jtl.pretrained import scratch
from jtl.tasks import Classify
from jtl.train import make_step

# Of architectures that `transformers` does not have, and which thus have no reference.
TINY = {
    "efficientnet_lite": {"width_coefficient": 0.2, "depth_coefficient": 0.1},
    "vgg": {"depths": [1, 2], "hidden_sizes": [4, 6]},
}
BLOCK = r"(.*/)?(layer|stage|block)_\d+"  # how the numbered parts of a network are called
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # to compile, not to run


pytestmark = pytest.mark.slow


def host(params):
    """Leaves by path, as NumPy's: arithmetic on JAX's would compile for each shape."""
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with a new classifier on random weights, a batch for it, and the path of its first block."""

    model: Model
    batch: dict
    block: str

    @property
    def params(self):
        return host(self.model.params)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request, tmp_path_factory):
    name = request.param
    architecture = ARCHITECTURES[name]
    if (REFERENCES / f"{name}.npz").exists():
        config, weights, batch, _ = read(name)
        model = from_files(name, config, weights)
    else:
        assert name in TINY, f"{name} is new: commit a reference of it, or give it a tiny configuration here"
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps({"model_type": name, **TINY[name]}))
        model = scratch(folder, key=jax.random.key(0))
        rng = np.random.default_rng(0)
        batch = {
            k: rng.normal(size=(2, *v.shape[1:])).astype(v.dtype)
            for k, v in architecture.example(model.config).items()
        }
    # Without dropout: the same forward in every step.
    drops = [
        f.name for f in dataclasses.fields(model.config) if "drop" in f.name and isinstance(f.default, float)
    ]
    config = dataclasses.replace(model.config, **dict.fromkeys(drops, 0.0))
    model = with_base(model.replace(config=config), module=architecture.module(config))
    model = heads.classifier(model, 3, key=jax.random.key(1))
    rows = jax.eval_shape(lambda model, batch: model(batch), model, batch)["logits"].shape[0]
    blocks = [path for path in modules(model, batch) if re.fullmatch(BLOCK, path)]
    return Case(model, dict(batch) | {"label": np.arange(rows) % 3}, blocks[0])


def stepped(case, model, loss, labels=None, optimizer=None, steps=1):
    """The states and metrics of steps on one batch; plain descent by default."""
    step = make_step(loss, optimizer or optax.sgd(0.1), labels, compiler_options=QUICK)
    state, found = step.init(model, jax.random.key(0)), []
    for _ in range(steps):
        state, metrics = step(state, case.batch)
        found.append(float(metrics["loss"]))
    assert np.isfinite(found).all()
    return state, found


def changed(before, after):
    """The paths of leaves that are not bit for bit the same."""
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_freeze(case):
    """The head alone trains: all of it moves, nothing else does, and nothing else has an optimiser's state."""
    state, _ = stepped(
        case, case.model, Classify(), finetune.freeze(case.model, "(?!head/).*"), optax.sgd(0.1, momentum=0.9)
    )
    after = host(state.model.params)
    assert changed(case.params, after) == {path for path in case.params if path.startswith("head/")}
    assert tree.size(state.opt_state) == tree.size(case.model.params["head"])


def test_lora(case):
    """Nothing changes at insertion, in a step the adapter alone moves, and folded in it computes the same."""
    found = {path.rpartition("/")[0] for path in case.params if re.fullmatch(f"{case.block}/.*kernel", path)}
    kernels = sorted(found)[:2]
    where = "|".join(map(re.escape, kernels))
    adapted = adapters.lora(case.model, rank=1, where=where, key=jax.random.key(2))
    forward = jax.jit(lambda model, batch: model(batch)["logits"], compiler_options=QUICK)
    state, _ = stepped(case, adapted, Classify(), finetune.train_only(adapted, ".*/lora/b"), optax.sgd(1.0))
    before, after = host(adapted.params), host(state.model.params)
    moved = changed(before, after)
    assert moved and moved <= {f"{kernel}/lora/b" for kernel in kernels}
    plain, inserted, trained = (forward(m, case.batch) for m in (case.model, adapted, state.model))
    assert error(inserted, plain) < 1e-5 < error(trained, plain)
    merged = adapters.merge(state.model)
    assert set(tree.flatten(merged.params)) == set(case.params)
    assert error(forward(merged, case.batch), trained) < 1e-4


def test_tap(case):
    """A loss of what the first block gives moves that block and what lies below, and nothing above."""

    def loss(model, batch, key):
        outputs = model(batch, taps=(case.block,))
        return jnp.square(outputs["taps"][case.block]).mean(), Aux({}, {})

    depth = tree.flatten(finetune.depths(case.model))
    (own,) = {depth[path] for path in depth if path.startswith(f"{case.block}/")}
    state, _ = stepped(case, case.model, loss)
    moved = changed(case.params, host(state.model.params))
    assert {depth[path] for path in moved} == set(range(own + 1))
    assert any(path.startswith(f"{case.block}/") for path in moved)


def test_layerwise(case):
    """Each leaf moves by its gradient times its own rate, and rates fall towards the input."""
    labels = finetune.layerwise(case.model, decay=0.5)
    rates, depth = tree.flatten(labels), tree.flatten(finetune.depths(case.model))
    assert rates["head/out/kernel"] == 1 and len({*rates.values()}) > 2
    assert all(rate == 0.5 ** (max(depth.values()) - depth[path]) for path, rate in rates.items())
    # Descent that keeps the gradient as its state.
    kept = optax.GradientTransformation(lambda p: p, lambda g, _, p: (jax.tree.map(jnp.negative, g), g))
    state, _ = stepped(case, case.model, Classify(), labels, kept)
    after, gradient = host(state.model.params), host(state.opt_state)
    assert all(np.isfinite(g).all() for g in gradient.values()) and any(g.any() for g in gradient.values())
    for path, rate in rates.items():
        expected = case.params[path] - rate * gradient[path]
        np.testing.assert_allclose(
            after[path], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=path
        )


def test_hint(case):
    """A student near its teacher comes nearer at the block that the hint names; the teacher gets no state."""
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype)  # noqa: E731
    teacher = case.model.with_params(jax.tree.map(noise, case.model.params))
    loss = distill.Distill(teacher, distill.Hint(student=case.block, teacher=case.block, over_units="mean"))
    labels = finetune.train_only(case.model, f"{case.block}/.*")
    state, losses = stepped(case, case.model, loss, labels, optax.adam(1e-3), steps=4)
    assert losses[0] > 0 and losses[-1] < 0.95 * losses[0]
    assert any(path.startswith(f"{case.block}/") for path in changed(case.params, host(state.model.params)))
