"""Gradient reversal and the methods that play against a second network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import domain, heads, tree
from jtl.domain.cdan import conditioned, entropy_weight, projected
from jtl.loss import Loss
from jtl.model import Mode
from jtl.tasks import Classify
from jtl.train import make_step

D, C = 6, 3
KEY = jax.random.key(5)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sides(batch):
    """Indices of the source and target rows that count."""
    d, w = np.asarray(batch["domain"]), np.asarray(batch["weight"])
    return np.flatnonzero((d == 0) & (w > 0)), np.flatnonzero((d == 1) & (w > 0))


def gradients(loss, model, batch):
    return jax.jit(jax.grad(lambda params: loss(model.with_params(params), batch, KEY)[0]))(model.params)


def adversarial(model, **options):
    options = {"on": "features", "width": D, "hidden": (8,), "horizon": 4, "key": KEY} | options
    return domain.adversary(model, **options)


# --- reversal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_reversal_is_the_identity_and_turns_the_gradient(scale):
    x = jnp.array([1.0, -2.0, 3.0])
    f = lambda x: jnp.sum(jnp.sin(x) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(lambda x, s: f(domain.reverse(x, s)))(x, jnp.float32(scale))
    assert float(value) == float(f(x))
    np.testing.assert_allclose(gradient, -scale * jax.grad(f)(x), rtol=1e-6)
    assert float(jax.grad(lambda s: f(domain.reverse(x, s)))(jnp.float32(scale))) == 0
    low = jax.grad(lambda x: domain.reverse(x, jnp.float32(scale)).sum())(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


def test_the_ramp_is_that_of_the_run(model, batch):
    p = np.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(domain.ramp(jnp.asarray(p)), 2 / (1 + np.exp(-10 * p)) - 1, rtol=1e-5)
    assert float(domain.ramp(7.0)) == float(domain.ramp(1.0))
    adversary = adversarial(model, peak=0.5)
    step = make_step(domain.DANN(), optax.sgd(0.1))
    state = step.init(adversary, KEY)
    seen = []
    for _ in range(6):
        state, metrics = step(state, batch)
        seen.append(float(metrics["reversal"]))
    expected = 0.5 * (2 / (1 + np.exp(-10 * np.minimum(np.arange(6) / 4, 1))) - 1)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    assert int(state.collections["discriminator"]["step"]) == 6
    # Evaluation counts nothing, whatever statistics it takes.
    for mode in (Mode(), Mode(stats="batch")):
        assert "discriminator" not in adversary.run(batch, mode)[1]
    constant = adversarial(model, horizon=None, peak=0.7)
    assert float(constant(batch)["reversal"]) == pytest.approx(0.7)


def test_the_body_gets_minus_lambda_times_the_plain_gradient(model, batch):
    class Plain(Loss):
        """The same discriminator on the features themselves."""

        def value(self, model, outputs, batch, key):
            head = heads.find(model, "discriminator")
            z = head.module.apply({"params": model.params["discriminator"]}, outputs["features"])[:, 0]
            return domain.dann(z, z, *domain.domains(batch)), {}

    adversary = adversarial(model, horizon=None, peak=0.3)
    ours, plain = (gradients(loss, adversary, batch) for loss in (domain.DANN(), Plain()))
    np.testing.assert_allclose(ours["body"]["kernel"], -0.3 * plain["body"]["kernel"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        ours["discriminator"]["out"]["kernel"], plain["discriminator"]["out"]["kernel"], rtol=1e-5, atol=1e-7
    )
    assert float(jnp.abs(plain["body"]["kernel"]).max()) > 1e-3


# --- DANN, CDAN ------------------------------------------------------------------------------------


def bce(z, wanted):
    d = 1 / (1 + np.exp(-np.asarray(z, np.float64)))
    return -np.log(d) if wanted else -np.log(1 - d)


def test_dann_is_a_mean_for_each_domain(model, batch):
    adversary = adversarial(model)
    z = np.asarray(adversary(batch)["domain_logits"])[:, 0]
    s, t = sides(batch)
    expected = bce(z[s], 0).mean() + bce(z[t], 1).mean()
    value, aux = domain.DANN()(adversary, batch, KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    hits = np.concatenate([z[s] <= 0, z[t] > 0])
    np.testing.assert_allclose(aux.metrics["domain_accuracy"], hits.mean(), rtol=1e-6)
    np.testing.assert_allclose(domain.dann(jnp.asarray(z[s]), jnp.asarray(z[t])), expected, rtol=1e-5)


def test_conditioning_is_the_outer_product_with_constant_predictions():
    rng = np.random.default_rng(3)
    f, z = (jnp.asarray(rng.normal(size=(4, n)), jnp.float32) for n in (D, C))
    joint = np.stack([np.outer(f[i], softmax(np.asarray(z))[i]).ravel() for i in range(4)])
    np.testing.assert_allclose(conditioned(f, z), joint, rtol=1e-5, atol=1e-7)
    assert float(jnp.abs(jax.grad(lambda z: jnp.sum(conditioned(f, z) ** 2))(z)).max()) == 0
    # Inner products of the randomised map estimate those of the outer products.
    maps = [jnp.asarray(rng.normal(size=(n, 40_000)), jnp.float32) for n in (D, C)]
    found = np.asarray(projected(f, z, *maps))
    np.testing.assert_allclose(found @ found.T, joint @ joint.T, atol=0.25)


def test_cdan_weights_by_entropy_within_each_domain(model, batch):
    adversary = domain.conditional_adversary(model, classes=C, width=D, hidden=(8,), horizon=4, key=KEY)
    outputs = adversary(batch)
    z, p = np.asarray(outputs["domain_logits"])[:, 0], softmax(np.asarray(outputs["logits"]))
    sure = 1 + np.exp((p * np.log(p)).sum(-1))
    np.testing.assert_allclose(entropy_weight(outputs["logits"]), sure, rtol=1e-5)
    s, t = sides(batch)
    weighted = sum((sure[i] * bce(z[i], d)).sum() / sure[i].sum() for i, d in ((s, 0), (t, 1)))
    plain = bce(z[s], 0).mean() + bce(z[t], 1).mean()
    np.testing.assert_allclose(domain.CDAN(entropy=True)(adversary, batch, KEY)[0], weighted, rtol=1e-5)
    np.testing.assert_allclose(domain.CDAN()(adversary, batch, KEY)[0], plain, rtol=1e-5)
    assert abs(weighted - plain) > 1e-4
    # No gradient reaches the classifier: neither through the conditioning nor through the weights.
    gradient = gradients(domain.CDAN(entropy=True), adversary, batch)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["head"]))
    assert (gradient["discriminator"]["out"]["kernel"] != 0).any()


def test_the_projection_is_as_wide_as_asked_and_never_trains(model, batch):
    adversary = domain.conditional_adversary(
        model, classes=C, width=D, hidden=(8,), horizon=4, key=KEY, projection=10
    )
    assert adversary(batch)["joint"].shape == (12, 10)
    step = make_step(domain.Source(Classify()) + domain.CDAN(), optax.sgd(0.1))
    state, _ = step(step.init(adversary, KEY), batch)
    for name, leaf in adversary.variables["multilinear"].items():
        np.testing.assert_array_equal(state.collections["multilinear"][name], leaf)


# --- MDD -------------------------------------------------------------------------------------------


def test_mdd_against_numpy(model, batch):
    adversary = adversarial(model, outputs=C, name="adversary", output="adversary_logits", peak=0.1)
    outputs = adversary(batch)
    f, g = np.asarray(outputs["logits"]), softmax(np.asarray(outputs["adversary_logits"], np.float64))
    s, t = sides(batch)
    named = f.argmax(-1)
    for gamma in (1.0, 4.0):
        expected = gamma * np.log(g[s, named[s]]).mean() + np.log(1 - g[t, named[t]]).mean()
        found = domain.MDD(gamma=gamma)(adversary, batch, KEY)[0]
        np.testing.assert_allclose(found, -expected, rtol=1e-5)
    # Where 1 - p is 0 in float32, its logarithm is not.
    sure = jnp.array([[60.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda z: domain.mdd(sure, sure, sure, z))(sure)
    np.testing.assert_allclose(value, -60.0, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[-1.0, 1.0]], rtol=1e-5)
    with pytest.raises(ValueError, match="two classes"):
        domain.mdd(*[jnp.ones((2, 1))] * 4)


# --- MCD -------------------------------------------------------------------------------------------


def test_the_discrepancy_is_the_mean_absolute_difference():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 7, C)).astype(np.float32)
    gap = np.abs(softmax(first) - softmax(second))
    weight = np.array([1, 0, 1, 1, 0, 0, 1], np.float32)
    np.testing.assert_allclose(
        domain.discrepancy(jnp.asarray(first), jnp.asarray(second)), gap.mean(), rtol=1e-5
    )
    found = domain.discrepancy(jnp.asarray(first), jnp.asarray(second), jnp.asarray(weight))
    np.testing.assert_allclose(found, gap[weight > 0].mean(), rtol=1e-5)


def test_mcd_goes_through_three_phases(model, batch):
    twins = domain.two_heads(model, key=KEY, repeats=2, width=D)
    assert (twins.params["head"]["out"]["kernel"] != twins.params["head_2"]["out"]["kernel"]).any()
    step = make_step(domain.MCD(), optax.adam(1e-2), domain.alternate(twins))
    state = step.init(twins, KEY)
    s, t = sides(batch)
    for phase in (0, 1, 2, 2, 0):
        before = jax.tree.map(np.asarray, state.model.params)
        outputs = state.model(batch)
        p, q = (softmax(np.asarray(outputs[name])) for name in ("logits", "logits_2"))
        label = np.asarray(batch["label"])[s]
        supervised = -np.log(p[s, label]).mean() - np.log(q[s, label]).mean()
        apart = np.abs(p[t] - q[t]).mean()
        state, metrics = step(state, batch)
        assert int(metrics["phase"]) == phase
        expected = [supervised, supervised - apart, apart][phase]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4, atol=1e-6)
        # Held leaves do not move, even by Adam's momentum.
        for path, leaf in tree.flatten(state.model.params).items():
            held = path.startswith("head") if phase == 2 else phase == 1 and path.startswith("body")
            assert bool((leaf == tree.flatten(before)[path]).all()) == held, (phase, path)
    # Even without these rates, a held leaf has no gradient.
    for count, frozen in ((1, "body"), (2, "head_2")):
        now = twins.replace(variables={**twins.variables, "mcd": {"step": jnp.int32(count)}})
        gradient = gradients(domain.MCD(), now, batch)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient[frozen]))


def test_mcd_keeps_frozen_leaves_and_given_rates(model):
    twins = domain.two_heads(model, key=KEY, repeats=2, width=D)
    rates = tree.assign([("body/.*", 0.0), ("head/.*", lambda step: 0.5), (".*", 0.25)], twins.params)
    labels = tree.flatten(domain.alternate(twins, rates))
    assert labels["body/kernel"] == 0.0
    assert [float(labels["head/out/bias"](i)) for i in range(5)] == [0.5, 0.5, 0, 0, 0.5]
    assert [float(labels["head_2/out/bias"](i)) for i in range(5)] == [0.25, 0.25, 0, 0, 0.25]
    with pytest.raises(ValueError, match="two_heads"):
        domain.alternate(model)


# --- ADDA ------------------------------------------------------------------------------------------


def test_adda_trains_each_side_on_its_own_loss(model, batch):
    moved = model.with_params({**model.params, "body": {"kernel": model.params["body"]["kernel"] + 0.2}})
    target = domain.discriminator(moved, width=D, hidden=(8,), key=KEY)
    head = heads.find(target, "discriminator")
    s, t = sides(batch)

    def tell(params, features):
        return head.module.apply({"params": params}, features)[:, 0]

    old, new = model(batch)["features"][s], target(batch)["features"][t]
    params = target.params["discriminator"]
    critic = bce(tell(params, old), 0).mean() + bce(tell(params, new), 1).mean()
    encoder = bce(tell(params, new), 0).mean()
    loss = domain.ADDA(model)
    (value, aux), gradient = jax.value_and_grad(lambda m: loss(m, batch, KEY), has_aux=True)(target)
    np.testing.assert_allclose(value, critic + encoder, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["encoder_loss"], encoder, rtol=1e-5)

    critics = jax.grad(
        lambda p: jax.nn.softplus(tell(p, old)).mean() + jax.nn.softplus(-tell(p, new)).mean()
    )(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        gradient.params["discriminator"], critics,
    )  # fmt: skip
    flipped = jax.grad(
        lambda k: jax.nn.softplus(
            tell(params, target.with_params({**target.params, "body": {"kernel": k}})(batch)["features"][t])
        ).mean()
    )(target.params["body"]["kernel"])
    np.testing.assert_allclose(gradient.params["body"]["kernel"], flipped, rtol=1e-4, atol=1e-7)


# --- refusals --------------------------------------------------------------------------------------


def test_what_is_missing_is_named(model, batch):
    adversary = adversarial(model)
    bare = {name: value for name, value in batch.items() if name != "domain"}
    for loss, on in (
        (domain.DANN(), adversary),
        (domain.Source(Classify()), model),
        (domain.MCD(), domain.two_heads(model, key=KEY, width=D)),
        (domain.ADDA(model), domain.discriminator(model, width=D, hidden=(8,), key=KEY)),
    ):
        with pytest.raises(KeyError, match="needs a column 'domain'.*it has .*'label', 'weight', 'x'"):
            loss(on, bare, KEY)
    with pytest.raises(KeyError, match="put jtl.domain.adversary on it"):
        domain.DANN()(model, batch, KEY)
    with pytest.raises(KeyError, match="no 'adversary_logits'.*near misses"):
        domain.MDD()(model, batch, KEY)
    with pytest.raises(ValueError, match="ADDA needs a discriminator"):
        domain.ADDA(model)(model, batch, KEY)
    with pytest.raises(ValueError, match="has 'discriminator' already"):
        adversarial(adversary)
    with pytest.raises(ValueError, match="horizon must be"):
        adversarial(model, horizon=0)
    with pytest.raises(ValueError, match="pass width="):
        adversarial(model, width=None)
    with pytest.raises(KeyError, match="reverses output 'pooled'.*'features', 'logits'"):
        adversarial(model, on="pooled")(batch)


def test_batches_are_checked_before_training(batch):
    domain.check(batch)
    one = {"domain": np.array([0, 0, 1]), "weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"1 rows of domain 1 \(target\)"):
        domain.check(one)
    with pytest.raises(ValueError, match=r"0 rows of domain 1"):
        domain.check({"domain": np.zeros(4, int)})
    with pytest.raises(ValueError, match=r"holds \[2\]"):
        domain.check({"domain": np.array([0, 0, 1, 1, 2])})
    with pytest.raises(KeyError, match="'domain'"):
        domain.check({"x": np.zeros(3)})


def test_source_is_the_term_on_source_rows_alone(model, batch):
    s, _ = sides(batch)
    alone = {name: value[s] for name, value in batch.items()}
    np.testing.assert_allclose(
        domain.Source(Classify())(model, batch, KEY)[0], Classify()(model, alone, KEY)[0], rtol=1e-6
    )
