"""Every method on every kind of layer: identity at insertion, merged = adapted, stacked = unrolled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, tree
from jtl import model as models
from jtl.adapters import SiteError
from jtl.loss import Loss
from jtl.train import make_step

METHODS = {
    "lora": adapters.lora,
    "dora": adapters.dora,
    "loha": adapters.loha,
    "lokr": adapters.lokr,
    "ia3": adapters.ia3,
    "vera": adapters.vera,
    "adalora": adapters.adalora,
}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.Dense(8, name="first")(x)
        return nn.gelu(nn.LayerNorm(name="norm")(x)), None


class Net(nn.Module):
    """A layer of every kind: embedding, convolutions, dense on one and two axes, a stack, a tied decoder."""

    stacked: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, ids, *, train: bool = False):
        embed = nn.Embed(11, 8, name="embed")
        x = embed(ids)
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.Conv(8, (3,), feature_group_count=4, name="grouped")(x)
        x = nn.DenseGeneral((2, 4), name="split")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="join")(x)
        layer = nn.remat(Layer) if self.remat else Layer
        if self.stacked:
            stack = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = layer(name=f"layer_{i}")(x)
        return {"features": x.mean(1), "logits": embed.attend(x)[:, 0]}


IDS = jnp.arange(12).reshape(4, 3) % 11
EVERYWHERE = "embed|conv|split|join|layers/first"


@pytest.fixture(scope="module")
def net():
    return models.linen(Net(), Net().init(jax.random.key(3), IDS))


def put(net, method, where=EVERYWHERE, **options):
    if method not in ("ia3",):
        options.setdefault("rank", 2)
    return METHODS[method](net, where=where, key=jax.random.key(1), batch=IDS, **options)


def stirred(model, pattern=".*", scale=0.3):
    """The model with noise on the leaves of its adapter."""
    names = "|".join(t.name for t in model.techniques if isinstance(t, adapters.Adapter))
    mask = tree.matches(f"(.*/)?({names})/{pattern}", model.params)

    def noise(path, leaf, chosen):
        key = tree.fold_path(jax.random.key(7), path)
        return leaf + scale * jax.random.normal(key, leaf.shape) if chosen else leaf

    return model.with_params(tree.map_with_path(noise, model.params, mask))


def close(one, other, atol=1e-5):
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_nothing_at_first(net, method):
    close(put(net, method)(IDS), net(IDS), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["embed|grouped|join", "conv|split", "layers/first"])
def test_merged_equals_adapted(net, method, where):
    adapted = stirred(put(net, method, where))
    merged = adapters.merge(adapted)
    assert merged.techniques == () and tree.diff(merged.params, net.params) == []
    close(merged(IDS), adapted(IDS))
    assert np.abs(adapted(IDS)["logits"] - net(IDS)["logits"]).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_equals_its_layers_unrolled(net, method):
    adapted = stirred(put(net, method, "layers/first"))
    params = dict(adapted.params)
    stack = params.pop("layers")
    params |= {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)}
    plain = models.linen(Net(stacked=False), {**adapted.variables, "params": params})
    sites = adapters.find(plain, "layer_./first", IDS)
    technique = adapted.techniques[0]
    unrolled = plain.replace(techniques=(adapters.Adapter(technique.name, technique.method, sites),))
    close(unrolled(IDS), adapted(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_under_remat_and_second_derivatives(net, method):
    adapted = stirred(put(net, method))
    remat = models.with_base(adapted, module=Net(remat=True))
    leaves, rest = tree.partition(adapted.params, tree.matches(f"(.*/)?{method}/.*", adapted.params))

    def value(model, leaves):
        return (model.with_params(tree.combine(leaves, rest))(IDS)["features"] ** 2).sum()

    first, again = (jax.grad(lambda leaves, m=m: value(m, leaves))(leaves) for m in (adapted, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, again)
    hessian = jax.grad(lambda leaves: tree.norm(jax.grad(lambda p: value(adapted, p))(leaves)))(leaves)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(hessian))


def test_lora_is_its_equation(net):
    """y = x W + (alpha / r) x A B, and alpha / sqrt(r) for rsLoRA."""
    x = jax.random.normal(jax.random.key(5), (5, 6))
    module = nn.Dense(4, name="only")
    dense = models.linen(module, module.init(jax.random.key(0), x))
    for stabilised, scale in ((False, 6 / 2), (True, 6 / 2**0.5)):
        adapted = stirred(
            adapters.lora(
                dense, rank=2, alpha=6.0, where="", key=jax.random.key(1), batch=x, stabilised=stabilised
            )
        )
        p = jax.tree.map(np.asarray, adapted.params)
        expected = np.asarray(x) @ (p["kernel"] + scale * p["lora"]["a"] @ p["lora"]["b"]) + p["bias"]
        np.testing.assert_allclose(adapted(x)["features"], expected, atol=1e-5)


def test_dora_is_its_equation(net):
    x = jax.random.normal(jax.random.key(5), (5, 6))
    dense = models.linen(nn.Dense(4), nn.Dense(4).init(jax.random.key(0), x))
    adapted = stirred(adapters.dora(dense, rank=2, alpha=4.0, where="", key=jax.random.key(1), batch=x))
    p = jax.tree.map(np.asarray, adapted.params)
    v = p["kernel"] + 2 * p["dora"]["a"] @ p["dora"]["b"]
    expected = np.asarray(x) @ (v / np.linalg.norm(v, axis=0) * p["dora"]["magnitude"]) + p["bias"]
    np.testing.assert_allclose(adapted(x)["features"], expected, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_take_from_the_weight(net, start):
    adapted = put(net, "lora", start=start)
    close(adapted(IDS), net(IDS))
    before, after = net.params["join"]["kernel"], adapted.params["join"]["kernel"]
    own = adapted.params["join"]["lora"]
    taken = (np.asarray(before) - np.asarray(after)).reshape(8, 8)
    np.testing.assert_allclose(taken, 2 * own["a"] @ own["b"], atol=1e-5)
    if start == "pissa":  # the best approximation of rank 2
        u, s, v = np.linalg.svd(np.asarray(before).reshape(8, 8))
        np.testing.assert_allclose(taken, u[:, :2] * s[:2] @ v[:2], atol=1e-5)


def test_rank_and_alpha_by_rules(net):
    ranks = (("embed", 1), (".*", 3))
    adapted = put(net, "lora", rank=ranks, alpha=((".*", 9.0),))
    assert adapted.params["embed"]["lora"]["a"].shape == (11, 1)
    assert adapted.params["layers"]["first"]["lora"]["a"].shape == (3, 8, 3)
    method = adapted.techniques[0].method
    assert method.scale(adapted.techniques[0].sites[0], 1) == 9.0
    with pytest.raises(
        tree.RuleError, match="rank, by the paths .*: no rule covers 1 of 2 leaves: 'conv'; end"
    ):
        put(net, "lora", rank=(("embed", 1),), where="embed|conv")
    assert adapters.method.at((("embed", 1), (".*", 3)), "conv", "rank") == 3
    with pytest.raises(ValueError, match="rank: no rule covers 'conv'"):
        adapters.method.at((("embed", 1),), "conv", "rank")


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("name", ["rank", "alpha"])
def test_a_rule_that_meets_no_layer_raises(net, method, name):
    wrong = {name: (("layers/frist", 1), (".*", 2))}
    with pytest.raises(
        tree.RuleError, match=f"{name}, .*: rule 'layers/frist' meets no .*near misses: 'first'"
    ):
        put(net, method, **wrong)
    hidden = {name: ((".*", 2), ("conv", 1), (".*", 3))}
    with pytest.raises(tree.RuleError, match="rule 'conv' is hidden"):
        put(net, method, **hidden)


class Square(Loss):
    def value(self, model, outputs, batch, key):
        return (outputs["features"] ** 2).mean(), {}


def test_adapter_and_head_train_and_the_rest_stays_bit_equal(net, key):
    model = put(heads.attach(net, heads.Classifier(2), on="features", width=8, key=key), "lora", dropout=0.5)
    labels = finetune.train_only(model, "(.*/)?lora/.*|head/.*")
    step = make_step(Square(), optax.adam(1e-2), labels)
    state = step.init(model, key)
    for _ in range(3):
        state, metrics = step(state, {"ids": IDS})
    after = tree.flatten(state.model.params)
    for path, leaf in tree.flatten(model.params).items():
        if "lora" not in path and "head" not in path:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
        elif path.endswith("lora/b"):
            assert (np.asarray(after[path]) != np.asarray(leaf)).any(), path
    assert np.isfinite(metrics["loss"])


def test_many_adapters_over_one_backbone(net, key):
    """vmap over adapters gives what each gives alone."""
    adapted = stirred(put(net, "lora"))
    own, frozen = tree.partition(adapted.params, tree.matches("(.*/)?lora/.*", adapted.params))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 0 * leaf]), own)
    run = lambda own: adapted.with_params(tree.combine(own, frozen))(IDS)["features"]  # noqa: E731
    together = jax.vmap(run)(many)
    for i in range(3):
        alone = run(jax.tree.map(lambda leaf, i=i: leaf[i], many))
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_equal_adapters_share_a_compilation(net):
    calls = []

    @jax.jit
    def forward(model, ids):
        calls.append(1)
        return model(ids)["features"]

    forward(put(net, "lora"), IDS)
    forward(stirred(put(net, "lora")), IDS)
    assert len(calls) == 1
    forward(net, IDS)
    assert len(calls) == 2


def test_a_step_takes_no_gradient_as_large_as_the_weight():
    """Compiled FLOPs of a LoRA step against forward + input gradients + low-rank products, and full tuning."""
    width, rows, rank, layers = 256, 2048, 8, 4

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(layers):
                x = nn.Dense(width, use_bias=False, name=f"dense_{i}")(x)
            return x

    x = jnp.zeros((rows, width))
    plain = models.linen(Mlp(), Mlp().init(jax.random.key(0), x))
    adapted = adapters.lora(plain, rank=rank, where=".*", key=jax.random.key(1), batch=x)

    def flops(model, labels):
        step = make_step(Square(), optax.sgd(0.1), labels)
        return step.lower(model, {"x": x}).compile().cost_analysis()["flops"]

    dense = 2 * rows * width * width * layers
    low = 2 * rows * 2 * width * rank * layers  # x A and (x A) B
    # The first layer's input needs no gradient, but one product of its own factors' needs dy.
    minimum = dense + dense * (layers - 1) / layers + 3 * low
    assert flops(adapted, finetune.train_only(adapted, ".*/lora/.*")) <= 1.03 * minimum
    assert flops(plain, None) > 1.4 * minimum


def test_bf16(net):
    adapted = stirred(put(net, "lora", where="layers/first"), scale=0.1)
    low = models.cast(adapted, jnp.bfloat16)(IDS)["features"]
    np.testing.assert_allclose(low, adapted(IDS)["features"], atol=0.06)


def test_bad_input(net):
    with pytest.raises(tree.RuleError, match="where='layer/fist' meets no layer; .*'layers/first'"):
        put(net, "lora", where="layer/fist")
    with pytest.raises(SiteError, match="cannot be adapted: layers/norm \\(LayerNorm\\)"):
        put(net, "lora", where="layers/.*")
    with pytest.raises(SiteError, match="meets containers alone \\(layers\\)"):
        put(net, "lora", where="layers")
    with pytest.raises(SiteError, match="rank 9 at conv: its weight is 24 x 8, .* between 1 and 8"):
        put(net, "lora", where="conv", rank=9)
    with pytest.raises(ValueError, match="conv has the adapter 'lora' already: merge it first"):
        put(put(net, "lora"), "dora", where="conv")
    with pytest.raises(ValueError, match="the model has no adapter 'x'; it has \\['lora'\\]"):
        adapters.merge(put(net, "lora"), "x")
    with pytest.raises(ValueError, match="not of jtl.models: pass batch="):
        adapters.lora(net, where="conv", key=jax.random.key(0))


def test_extract_gives_back_what_was_merged(net):
    where = "embed|conv|layers/first"
    adapted = stirred(put(net, "lora", where=where))
    again = adapters.extract(net, adapters.merge(adapted), rank=2, where=where, batch=IDS)
    close(again(IDS), adapted(IDS), atol=1e-4)
    # A lower rank keeps the largest singular values.
    change = np.asarray(adapters.merge(adapted).params["conv"]["kernel"] - net.params["conv"]["kernel"])
    own = adapters.extract(net, adapters.merge(adapted), rank=1, where="conv", batch=IDS).params["conv"][
        "lora"
    ]
    u, s, v = np.linalg.svd(change.reshape(24, 8), full_matrices=False)
    np.testing.assert_allclose(own["a"] @ own["b"], s[0] * np.outer(u[:, 0], v[0]), atol=1e-5)
    with pytest.raises(ValueError, match="conv/kernel: the tuned model has nothing where"):
        adapters.extract(net, net.with_params({}), rank=1, where="conv", batch=IDS)
    with pytest.raises(
        ValueError, match=r"has the adapters \['lora'\], .*: pass jtl.adapters.merge\(tuned\)"
    ):
        adapters.extract(net, adapted, rank=2, where=where, batch=IDS)


@pytest.mark.slow
def test_no_leaf_goes_unread(net):
    """At most one adapter takes a layer's place, and none takes that of one whose activations are changed."""
    options = dict(where="conv", key=jax.random.key(1), batch=IDS)
    plain = adapters.merge(stirred(put(net, "lora", where="conv")))
    with pytest.raises(ValueError, match="conv has the adapter 'lora' already"):
        adapters.extract(put(net, "lora", where="conv"), plain, rank=1, where="conv", name="b", batch=IDS)
    for insert in (adapters.bottleneck, adapters.loreft):
        changed = insert(net, **options)
        with pytest.raises(SiteError, match="'lora' would take the place of conv, .* in last"):
            put(changed, "lora", where="embed|conv")
        with pytest.raises(SiteError, match="'lora' would take the place of conv"):
            adapters.extract(changed, plain, rank=1, where="conv", batch=IDS)
        both = insert(put(net, "lora", where="conv"), **options)
        leaves = tree.partition(both.params, tree.matches("conv/(lora|bottleneck|loreft)/.*", both.params))[0]
        both = both.with_params(jax.tree.map(lambda leaf: leaf + 0.1, both.params))
        gradient = jax.grad(lambda p, m=both: (m.with_params(p)(IDS)["features"] ** 2).sum())(both.params)
        for path in tree.flatten(leaves):
            assert np.abs(tree.flatten(gradient)[path]).max() > 0, path
    with pytest.raises(
        ValueError, match="conv has leaves called 'lora' already, such as conv/lora/a: choose"
    ):
        adapters.bottleneck(put(net, "lora", where="conv"), name="lora", **options)


def test_dora_keeps_a_column_of_zeros_and_trains_it():
    x = jax.random.normal(jax.random.key(5), (5, 6))
    kernel = jax.random.normal(jax.random.key(0), (6, 4)).at[:, 1].set(0)
    dense = models.linen(nn.Dense(4, use_bias=False), {"params": {"kernel": kernel}})
    adapted = adapters.dora(dense, rank=2, where="", key=jax.random.key(1), batch=x)
    for one, other in (
        (dense, adapted),
        (models.cast(dense, jnp.bfloat16), models.cast(adapted, jnp.bfloat16)),
    ):
        np.testing.assert_allclose(other(x)["features"], one(x)["features"], rtol=2**-7, atol=1e-6)

    loss = lambda params: ((adapted.with_params(params)(x)["features"] - 1) ** 2).sum()  # noqa: E731
    step = lambda params: jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))  # noqa: E731
    params = step(step(adapted.params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert params["dora"]["b"][:, 1].any() and params["dora"]["magnitude"][1] != 0


def test_dora_takes_its_norm_as_a_constant():
    """Its gradient is that of the paper's section 4.3, and not of equation 5 as it stands."""
    x = jax.random.normal(jax.random.key(5), (5, 6))
    dense = models.linen(nn.Dense(4), nn.Dense(4).init(jax.random.key(0), x))
    adapted = stirred(adapters.dora(dense, rank=2, alpha=4.0, where="", key=jax.random.key(1), batch=x))

    def explicit(detach):
        def loss(own):
            v = adapted.params["kernel"] + 2 * own["a"] @ own["b"]
            w = v * (own["magnitude"] / detach(jnp.linalg.norm(v, axis=0)))[None]
            return jnp.sin(x @ w + adapted.params["bias"][None]).sum()

        return jax.grad(loss)(adapted.params["dora"])

    params = adapted.params
    found = jax.grad(lambda own: jnp.sin(adapted.with_params({**params, "dora": own})(x)["features"]).sum())(
        params["dora"]
    )
    close(found, explicit(jax.lax.stop_gradient), atol=1e-5)
    assert np.abs(found["b"] - explicit(lambda norm: norm)["b"]).max() > 1e-2


def test_vera_draws_its_pair_as_peft_does(net):
    """Kaiming-uniform with gain sqrt(2): bound sqrt(6 / fan-in), variance 2 / fan-in."""
    pair = put(net, "vera", rank=256).variables["vera"]
    for leaf, fan in (("shared_a", 24), ("shared_b", 256)):
        values = np.asarray(pair[leaf])
        assert np.abs(values).max() <= (6 / fan) ** 0.5
        np.testing.assert_allclose(np.abs(values).max(), (6 / fan) ** 0.5, rtol=0.01)
        np.testing.assert_allclose(values.var(), 2 / fan, rtol=0.05)


def test_ranks_of_lokr(net):
    adapted = put(net, "lokr", where="conv", rank=100)
    assert adapted.params["conv"]["lokr"]["a"].shape == (6, 4)  # 24 = 4 x 6, 8 = 2 x 4
    with pytest.raises(SiteError, match="rank 0 at conv: it must be at least 1"):
        put(net, "lokr", where="conv", rank=0)
