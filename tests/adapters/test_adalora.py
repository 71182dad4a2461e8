"""AdaLoRA: its equations in NumPy, its pruning beside that of PEFT, and a whole run of it."""

from types import SimpleNamespace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, tree
from jtl import model as models
from jtl.adapters.allocate import budget, top
from jtl.adapters.site import SiteError
from jtl.loss import Loss
from jtl.train import make_step

X = jax.random.normal(jax.random.key(5), (16, 6))
TRAINED = "(.*/)?adalora/.*"


class Net(nn.Module):
    """Two layers of their own, and a stack of three."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, name="first")(x))
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, name="last")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(5, name="dense")(x)), None


class Square(Loss):
    def value(self, model, outputs, batch, key):
        return jnp.square(outputs["features"] - batch["target"]).mean(), {}


@pytest.fixture(scope="module")
def net():
    return models.linen(Net(), jax.jit(Net().init)(jax.random.key(3), X))


@pytest.fixture(scope="module")
def adapted(net):
    """Rank 3 in five matrices: 15 singular values, none of them 0."""
    model = adapters.adalora(
        net, rank=3, alpha=6.0, where="first|last|layers/dense", key=jax.random.key(1), batch=X
    )
    mask = tree.matches(TRAINED, model.params)

    def noise(path, leaf, own):
        return leaf + 0.3 * jax.random.normal(tree.fold_path(jax.random.key(7), path), leaf.shape) * own

    return model.with_params(tree.map_with_path(noise, model.params, mask))


@pytest.fixture(scope="module")
def batch():
    return {"x": X, "target": jax.random.normal(jax.random.key(6), (16, 4))}


def own(model):
    """The adapter's leaves, by path."""
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(model.params).items() if "adalora" in path}


def alone(model):
    """A tree of the adapter's leaves alone."""
    return tree.nest({path: jnp.asarray(leaf) for path, leaf in own(model).items()})


def test_it_changes_nothing_at_first_and_then_is_its_equation(net, adapted):
    fresh = adapters.adalora(net, rank=3, where="first", key=jax.random.key(1), batch=X)
    np.testing.assert_array_equal(fresh(X)["features"], net(X)["features"])
    assert fresh.techniques[0].method.alpha == 3.0  # the paper's scale, 1
    p = own(adapted)
    merged = adapters.merge(adapted)
    change = merged.params["first"]["kernel"] - net.params["first"]["kernel"]
    product = p["first/adalora/p"] @ np.diag(p["first/adalora/lambda"]) @ p["first/adalora/q"]
    np.testing.assert_allclose(change, 6 / 3 * product, atol=1e-6)
    np.testing.assert_allclose(merged(X)["features"], adapted(X)["features"], atol=1e-5)
    with pytest.raises(SiteError, match="rank 5 at last: its weight is 5 x 4, .* between 1 and 4"):
        adapters.adalora(net, rank=5, where="last", key=jax.random.key(1), batch=X)


def gaps(adapted):
    """|P^T P - I| and |Q Q^T - I| of the five matrices, by NumPy."""
    found = []
    for path, leaf in own(adapted).items():
        for matrix in np.atleast_3d(leaf) if leaf.ndim == 3 else [leaf]:
            if path.endswith("/p"):
                found.append(np.linalg.norm(matrix.T @ matrix - np.eye(3)))
            elif path.endswith("/q"):
                found.append(np.linalg.norm(matrix @ matrix.T - np.eye(3)))
    assert len(found) == 10
    return np.array(found)


def test_orthogonality(net, adapted, batch):
    paper, _ = adapters.Orthogonality()(adapted, batch, None)
    np.testing.assert_allclose(paper, (gaps(adapted) ** 2).sum(), rtol=1e-5)
    peft, _ = adapters.Orthogonality(form="peft")(adapted, batch, None)
    np.testing.assert_allclose(peft, gaps(adapted).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="the model has no AdaLoRA; insert it"):
        adapters.Orthogonality()(net, batch, None)


@pytest.mark.parametrize("form", ["paper", "peft"])
def test_orthogonal_vectors_have_no_penalty_and_no_gradient(adapted, batch, form):
    def orthogonal(path, leaf):
        eye = path.endswith(("adalora/p", "adalora/q"))
        return jnp.broadcast_to(jnp.eye(*leaf.shape[-2:]), leaf.shape) if eye else leaf

    model = adapted.with_params(tree.map_with_path(orthogonal, adapted.params))
    loss = adapters.Orthogonality(form=form)
    value, gradient = jax.value_and_grad(lambda params: loss(model.with_params(params), batch, None)[0])(
        model.params
    )
    assert value == 0 and all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_budget():
    """All at first, a cubic fall, the target at the end; appendix A in the form of the authors' code."""
    settings = dict(total=100, target=20, steps=50, start=10, final=15)
    found = [int(budget(t, **settings)) for t in range(50)]
    expected = [
        100 if t < 10 else 20 if t >= 35 else int(20 + 80 * (1 - (t - 10) / (50 - 15 - 10)) ** 3)
        for t in range(50)
    ]
    assert found == expected and found[10] == 100 and found[34] == 20 and sorted(found)[::-1] == found


def test_top_is_exact_with_ties_and_at_the_ends():
    score = {"a": jnp.array([[1.0, 5.0], [2.0, 1.0]]), "b": jnp.array([1.0, 7.0])}
    for count, kept in ((0, 0), (3, 3), (4, 4), (6, 6)):
        mask = top(score, count)
        assert sum(int(m.sum()) for m in mask.values()) == kept
    np.testing.assert_array_equal(top(score, 3)["a"], [[False, True], [True, False]])
    np.testing.assert_array_equal(top(score, 3)["b"], [False, True])


class Paper:
    """Algorithm 1 in NumPy on given gradients and raw updates, with single matrices as its unit."""

    def __init__(self, rank, steps, start, final, every, beta1, beta2):
        self.settings = rank, steps, start, final, every, beta1, beta2
        self.smooth, self.spread, self.t = {}, {}, 0

    def __call__(self, params, gradients, updates):
        rank, steps, start, final, every, beta1, beta2 = self.settings
        t, self.t = self.t, self.t + 1
        if t < steps - final:
            for path, w in params.items():
                now = np.abs(w * gradients[path])
                self.smooth[path] = beta1 * self.smooth.get(path, 0 * now) + (1 - beta1) * now
                self.spread[path] = beta2 * self.spread.get(path, 0 * now) + (1 - beta2) * np.abs(
                    now - self.smooth[path]
                )
        entry = {path: self.smooth[path] * self.spread[path] for path in params}
        triplets = {}
        for path in params:
            if path.endswith("lambda"):
                p, q = entry[path.replace("lambda", "p")], entry[path.replace("lambda", "q")]
                for index in np.ndindex(entry[path].shape):
                    *layer, i = index
                    triplets[path, index] = (
                        entry[path][index] + p[tuple(layer)][:, i].mean() + q[tuple(layer)][i].mean()
                    )
        new = {path: params[path] + updates[path] for path in params}
        target = rank * 5
        left = len(triplets)
        if start <= t < steps - final and t % every == 0:
            left = int(target + (left - target) * (1 - (t - start) / (steps - final - start)) ** 3)
        elif t >= steps - final:
            left = target
        for path, index in sorted(triplets, key=triplets.get)[: len(triplets) - left]:
            new[path][index] = 0
        return new


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_is_algorithm_1(adapted, every):
    """Twelve updates with random gradients under SGD: P, Λ and Q after each are NumPy's."""
    settings = dict(rank=1, steps=12, start=2, final=3, every=every)
    optimizer = adapters.allocate(optax.sgd(0.3), decay=(0.8, 0.7), **settings)
    paper = Paper(**settings, beta1=0.8, beta2=0.7)
    params = alone(adapted)
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    state = optimizer.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    counts = []
    for t in range(12):
        gradients = tree.map_with_path(
            lambda path, leaf, t=t: jax.random.normal(
                jax.random.fold_in(tree.fold_path(jax.random.key(9), path), t), leaf.shape
            ),
            params,
        )
        raw = {path: np.asarray(g, np.float64) for path, g in tree.flatten(gradients).items()}
        expected = paper(expected, raw, {path: -0.3 * g for path, g in raw.items()})
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found = tree.flatten(params)
        for path, leaf in expected.items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=f"{path} after {t}")
        counts.append(sum(int((found[path] != 0).sum()) for path in found if path.endswith("lambda")))
    assert counts[:2] == [15, 15] and counts[-3:] == [5, 5, 5]
    if every == 3:  # what was pruned comes back between two prunings
        assert counts[3] < 15 and counts[4] == 15


def test_it_trains_in_one_compilation(adapted, batch):
    """The whole recipe: the loss falls, the mean rank is met, and what is frozen stays bit-equal."""
    optimizer = adapters.allocate(optax.adam(1e-2), rank=1, steps=40, start=5, final=10)
    loss = Square() + 0.1 * adapters.Orthogonality()
    step = make_step(loss, optimizer, finetune.train_only(adapted, TRAINED))
    chex.clear_trace_counter()
    step._compiled = jax.jit(chex.assert_max_traces(step.update, n=1), donate_argnums=0)
    state = step.init(adapted, jax.random.key(0))
    losses, masks = [], []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["Square"]))
        leaves = own(state.model)
        masks.append(
            np.concatenate([v.ravel() != 0 for path, v in leaves.items() if path.endswith("lambda")])
        )
    assert losses[-1] < 0.8 * losses[0]
    assert masks[4].all() and masks[-1].sum() == 5
    assert all((mask == masks[-1]).all() for mask in masks[-10:])  # the last updates prune the same
    after = tree.flatten(state.model.params)
    for path, leaf in tree.flatten(adapted.params).items():
        if "adalora" not in path:
            np.testing.assert_array_equal(after[path], leaf)


def test_another_rate_on_the_singular_values_is_nan_and_not_silent(adapted, batch):
    half = jax.tree.map(lambda label: 0.5 * label, finetune.train_only(adapted, TRAINED))
    step = make_step(Square(), adapters.allocate(optax.sgd(0.1), rank=1, steps=4, start=0, final=2), half)
    state = step.init(adapted, jax.random.key(0))
    for _ in range(4):
        state, metrics = step(state, batch)
    assert np.isnan(metrics["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 5, "final": 5}, "start \\+ final < steps"),
        ({"every": 0}, "every >= 1"),
        ({"decay": (1.0, 0.5)}, "decay must be two numbers in \\(0, 1\\), got \\(1.0, 0.5\\)"),
    ],
)
def test_bad_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        adapters.allocate(optax.sgd(0.1), **{"rank": 1, "steps": 10, "start": 1, "final": 1, **settings})


def test_what_does_not_train_cannot_be_allocated(adapted):
    optimizer = adapters.allocate(optax.sgd(0.1), rank=1, steps=10, start=1, final=1)
    with pytest.raises(
        ValueError, match="no leaf of an adapter 'adalora' does not train|no leaf of an adapter"
    ):
        optimizer.init({"head": jnp.zeros(3)})
    with pytest.raises(ValueError, match="first/adalora/q.* does not train; label p, lambda and q alike"):
        optimizer.init(tree.remove("first/adalora/q", alone(adapted)))
    with pytest.raises(ValueError, match="rank=4 is above the adapter's mean rank, 3"):
        adapters.allocate(optax.sgd(0.1), rank=4, steps=10, start=1, final=1).init(alone(adapted))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, name="two")(nn.Dense(5, name="one")(x))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_pruning_and_penalty_beside_peft():
    """The same parameters and gradients in PEFT's RankAllocator: importance, budget and which values go."""
    import torch
    from peft import AdaLoraConfig, get_peft_model

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(6, 5), torch.nn.Linear(5, 7)

        def forward(self):
            return SimpleNamespace(loss=torch.zeros(()))

    settings = dict(steps=14, start=2, final=4, every=2)
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=14, tinit=2, tfinal=4, deltaT=2, beta1=0.85, beta2=0.8,
        orth_reg_weight=0.5, target_modules=["one", "two"],
    )  # fmt: skip
    theirs = get_peft_model(Base(), config)
    layers = {name: getattr(theirs.base_model.model, name) for name in ("one", "two")}
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_E):
            torch.nn.init.normal_(part["default"])

    def read(get):
        return {
            name: {
                "adalora": {
                    "p": jnp.asarray(get(layer.lora_A["default"]).numpy().T),
                    "lambda": jnp.asarray(get(layer.lora_E["default"]).numpy().ravel()),
                    "q": jnp.asarray(get(layer.lora_B["default"]).numpy().T),
                }
            }
            for name, layer in layers.items()
        }

    # No update but the pruning: the gradients reach the scores alone.
    optimizer = adapters.allocate(optax.set_to_zero(), rank=2, decay=(0.85, 0.8), **settings)
    params = read(lambda p: p.detach().clone())
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for t in range(14):
        for layer in layers.values():
            for part in (layer.lora_A, layer.lora_B, layer.lora_E):
                shape = tuple(part["default"].shape)
                part["default"].grad = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
        gradients = read(lambda p: p.grad)
        theirs.base_model.update_and_allocate(t)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params, read(lambda p: p.detach()), atol=1e-6)
        allocator = theirs.base_model.rankallocator
        for name in layers if t < 10 else ():  # PEFT forgets the scores after the last pruning
            key = f"{name}.lora_E.default"
            chex.assert_trees_all_close(
                state.sensitivity[f"{name}/adalora/lambda"] * state.uncertainty[f"{name}/adalora/lambda"],
                allocator._element_score(key).numpy().ravel(),
                rtol=1e-4,
            )
    assert sum(int((params[name]["adalora"]["lambda"] != 0).sum()) for name in layers) == 4

    ours = models.linen(Two(), jax.jit(Two().init)(jax.random.key(0), X))
    ours = adapters.adalora(ours, rank=4, where="one|two", key=jax.random.key(0), batch=X)
    ours = ours.with_params(tree.overlay(ours.params, params, replace=True))
    penalty = 0.5 * adapters.Orthogonality(form="peft")
    np.testing.assert_allclose(penalty(ours, {}, None)[0], theirs.base_model.forward().loss.item(), rtol=1e-5)
