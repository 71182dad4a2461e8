"""Prefix tuning: the definition in NumPy on every kind of attention, bad input, and the real PEFT."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from numpy_encoder import FIRST, attend, encode, pooled, small, texts, torch_logits, torch_model

from jtl import adapters, finetune, heads, pretrained, tree
from jtl import model as models
from jtl.adapters import SiteError, peft
from jtl.adapters.peft import AdapterFileError
from jtl.models.parts.attention import Attention
from jtl.tasks import Classify
from jtl.train import make_step

LENGTH = 3
NAMES = ("bert", "roberta", "distilbert")


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def plain(name):
    return small(name)


@pytest.fixture(scope="module")
def bert():
    return small("bert")


def stirred(model):
    """With vectors of the size of keys and values, as after training."""

    def noise(path, leaf):
        key = tree.fold_path(jax.random.key(7), path)
        return jax.random.normal(key, leaf.shape) if "/prefix/" in path else leaf

    return model.with_params(tree.map_with_path(noise, model.params))


def prefixed(model, **options):
    return stirred(adapters.prefix(model, length=LENGTH, key=jax.random.key(1), **options))


def pairs(model):
    """Keys and values of each layer."""
    layers = [model.params["encoder"][f"layer_{i}"]["attention"] for i in range(2)]
    return [tuple(layer[name]["prefix"]["vectors"] for name in ("key", "value")) for layer in layers]


# Programs that must agree to the bit: conftest's first level of LLVM rounds otherwise in each of them.
run = jax.jit(lambda model, batch: model(batch), compiler_options={"xla_backend_optimization_level": 3})


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_is_the_definition(name, plain, side):
    """Each row of a padded batch is what NumPy makes of that text alone."""
    model = prefixed(plain)
    batch, rows, types = texts(name, left=side == "left")
    found = run(model, batch)
    L = batch["input_ids"].shape[1]
    assert {key: value.shape for key, value in found.items()} == {
        "sequence": (3, L, 12),
        "features": (3, 12),
        "pooled": (3, 12),
    }
    for i, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        # BERT and DistilBERT number columns, so padding on the left moves their texts; RoBERTa numbers tokens.
        start = L - len(row) if side == "left" else 0
        positions = FIRST[name] + LENGTH + np.arange(len(row)) + (0 if name == "roberta" else start)
        states = encode(model, row, kinds, positions=positions, prefix=pairs(model))
        np.testing.assert_allclose(found["sequence"][i, start : start + len(row)], states, atol=1e-4)
        np.testing.assert_allclose(found["features"][i], states.mean(0), atol=1e-4)
        if not start:
            np.testing.assert_allclose(found["pooled"][i], pooled(plain, states[0]), atol=1e-4)


def test_without_mask_every_token_is_real(name, plain):
    model = prefixed(plain)
    batch, *_ = texts(name, (4, 4))
    bare = {field: value for field, value in batch.items() if field != "attention_mask"}
    for output, value in run(model, batch).items():
        np.testing.assert_array_equal(run(model, bare)[output], value)


def test_padding_keeps_its_position():
    """RoBERTa without a mask attends to padding, at the position of padding."""
    model = prefixed(small("roberta"))
    ids = np.array([[5, 6, 1]], np.int32)
    states = encode(
        model, ids[0], np.zeros(3, int), positions=np.array([2 + LENGTH, 3 + LENGTH, 1]), prefix=pairs(model)
    )
    np.testing.assert_allclose(run(model, {"input_ids": ids})["sequence"][0], states, atol=1e-4)


class Layer(nn.Module):
    """An attention, which looks back only if ``causal``."""

    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        L = x.shape[1]
        future = jnp.where(jnp.arange(L)[None] <= jnp.arange(L)[:, None], 0.0, -1e30)
        return x + Attention(3, name="attention")(x, future[None, None] if self.causal else None), None


class Stack(nn.Module):
    """Two such layers, scanned and rematerialised."""

    causal: bool = False

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return {"sequence": stack(self.causal, name="layers")(x, None)[0]}


@pytest.mark.parametrize("causal", [False, True])
def test_your_own_stack_of_attentions(causal):
    # The annotation of Attention's bias knows masks of keys alone; the computation takes any.
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        x = jax.random.normal(jax.random.key(0), (2, 5, 12))
        module = Stack(causal)
        model = prefixed(models.linen(module, jax.jit(module.init)(jax.random.key(3), x)), batch=x)
        found = run(model, x)["sequence"]
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model.params).items()}
    assert p["layers/attention/key/prefix/vectors"].shape == (2, LENGTH, 12)
    for row, given in zip(found, np.asarray(x, np.float64), strict=True):
        y = given
        for i in range(2):
            own = {path.removeprefix("layers/"): leaf[i] for path, leaf in p.items()}
            pair = tuple(own[f"attention/{name}/prefix/vectors"] for name in ("key", "value"))
            y = y + attend(own, "attention", y, pair, causal=causal)
        np.testing.assert_allclose(row, y, atol=1e-4)


class Padded(nn.Module):
    """A causal attention over padded texts: each query's mask is its own."""

    @nn.compact
    def __call__(self, x, mask):
        L = x.shape[1]
        past = jnp.arange(L)[None] <= jnp.arange(L)[:, None]
        open_ = past[None, None] & (mask != 0)[:, None, None]
        return {"sequence": Attention(3, name="attention")(x, jnp.where(open_, 0.0, -1e30))}


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_and_padded(side):
    """Each text looks back at its own tokens and at the prefix, whatever the padding beside it."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 12))
    lengths = (5, 3, 1)
    mask = np.array([[0] * (5 - n) + [1] * n if side == "left" else [1] * n + [0] * (5 - n) for n in lengths])
    batch = {"x": x, "mask": mask}
    module = Padded()
    model = prefixed(models.linen(module, jax.jit(module.init)(jax.random.key(3), **batch)), batch=batch)
    found = run(model, batch)["sequence"]
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model.params).items()}
    pair = tuple(p[f"attention/{name}/prefix/vectors"] for name in ("key", "value"))
    for row, given, real in zip(np.asarray(found), np.asarray(x, np.float64), mask != 0, strict=True):
        np.testing.assert_allclose(
            row[real], attend(p, "attention", given[real], pair, causal=True), atol=1e-4
        )
    gradient = jax.grad(
        lambda params: (model.with_params(params)(batch)["sequence"] ** 2 * mask[..., None]).sum()
    )(model.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_images_too():
    """In a ViT every position attends to the prefix, and no position moves."""
    plain = small("vit")
    model = prefixed(plain)
    batch = {"image": jax.random.normal(jax.random.key(0), (2, 4, 4, 1))}
    taps = ("encoder/layer_0/attention_norm", "encoder/layer_0/attention")
    found = jax.jit(lambda model, batch: model(batch, taps=taps))(model, batch)
    assert found["sequence"].shape == (2, 5, 12)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(model.params).items()}
    for x, y in zip(*(np.asarray(found["taps"][tap]) for tap in taps), strict=True):
        np.testing.assert_allclose(y, attend(p, taps[1], x, pairs(model)[0]), atol=1e-4)
    before = jax.jit(lambda model, batch: model(batch, taps=taps))(plain, batch)["taps"]
    np.testing.assert_allclose(found["taps"][taps[0]], before[taps[0]], atol=1e-5)


@pytest.mark.slow
def test_with_other_adapters(bert, key):
    batch, *_ = texts("bert")
    options = dict(rank=2, where="embeddings/position|.*/(query|value)", key=key)
    expected = run(prefixed(bert), batch)["features"]
    both = prefixed(adapters.lora(bert, **options))
    np.testing.assert_allclose(run(both, batch)["features"], expected, atol=1e-5)
    with pytest.raises(
        SiteError, match="place of encoder/layer_0/attention/value, .* leaves of 'prefix' there: put 'prefix'"
    ):
        adapters.lora(prefixed(bert), **options)
    prompted = adapters.prompt(prefixed(bert), length=2, key=key)
    other = stirred(adapters.prefix(adapters.prompt(bert, length=2, key=key), length=LENGTH, key=key))
    np.testing.assert_allclose(run(prompted, batch)["pooled"], run(other, batch)["pooled"], atol=1e-5)
    low = run(models.cast(prefixed(bert), jnp.bfloat16), batch)["features"]
    np.testing.assert_allclose(low, expected, atol=0.2)


def test_only_prefix_and_head_train(bert, key):
    batch, rows, _ = texts("bert")
    batch["label"] = np.arange(len(rows), dtype=np.int32) % 2
    model = adapters.prefix(heads.classifier(bert, 2, key=key), length=LENGTH, key=key)
    step = make_step(Classify(), optax.adam(1e-2), finetune.train_only(model, ".*/prefix/.*|head/.*"))
    state = step.init(model, key)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    old, new = tree.flatten(model.params), tree.flatten(state.model.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in old if "/prefix/" in path or path.startswith("head/")}


def test_transformations(bert):
    """One trace for equal models; vmap over prefixes; rematerialised gradients, and none that is zero."""
    batch, *_ = texts("bert")
    model = prefixed(bert)
    counted = jax.jit(chex.assert_max_traces(lambda model, batch: model(batch)["features"], n=1))
    chex.clear_trace_counter()
    for equal in (model, prefixed(bert)):
        counted.lower(equal, batch)
    leaves, rest = tree.partition(model.params, tree.matches(".*/prefix/.*", model.params))

    def loss(leaves):
        return (model.with_params(tree.combine(leaves, rest))(batch)["features"] ** 2).sum()

    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), leaves)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
    value, gradient = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(
        jax.tree.map(lambda leaf: -leaf, leaves)
    )
    np.testing.assert_allclose(values[1], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-4), gradients, gradient)
    assert all(
        (np.abs(leaf).max(1) > 1e-4).all() for leaf in jax.tree.leaves(gradient)
    )  # every vector is read


def test_bad_input(bert, key):
    with pytest.raises(ValueError, match="prefix: length must be at least 1, got 0"):
        adapters.prefix(bert, length=0, key=key)
    with pytest.raises(
        ValueError, match="prefix of length 16 and texts of length 1 need 17 positions; the model has 16"
    ):
        adapters.prefix(bert, length=16, key=key)
    with pytest.raises(ValueError, match="need 17 positions; the model has 16: cut texts to 10 tokens"):
        adapters.prefix(small("roberta"), length=6, key=key)({"input_ids": np.full((1, 11), 5, np.int32)})
    with pytest.raises(ValueError, match="the model has the prefix 'prefix' already; it can have one"):
        adapters.prefix(prefixed(bert), name="other", key=key)
    with pytest.raises(SiteError, match="needs attentions .*this model is efficientnet_lite"):
        adapters.prefix(small("efficientnet_lite"), key=key)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_peft_opens_ours_and_we_open_theirs(kind, tmp_path):
    """The same logits, with padding on either side and without a mask, and of a prefix from an MLP."""
    import torch
    from peft import PeftModel, PrefixTuningConfig, get_peft_model

    base = torch_model(kind, tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    batches = [texts(kind)[0], texts(kind, left=True)[0], texts(kind, (4, 4))[0]]
    batches[2].pop("attention_mask")

    model = prefixed(ours)
    peft.save(model, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    back = peft.load(ours, tmp_path / "ours")
    for batch in batches:
        logits = run(model, batch)["logits"]
        np.testing.assert_allclose(torch_logits(theirs, batch), logits, atol=1e-4)
        np.testing.assert_array_equal(run(back, batch)["logits"], logits)
    assert (back.techniques, tree.diff(back.params, model.params)) == (model.techniques, [])

    for projection in (False, True):
        config = PrefixTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=8
        )
        theirs = get_peft_model(torch_model(kind, tmp_path / "again"), config)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.4)
        theirs.save_pretrained(str(tmp_path / f"theirs-{projection}"))
        model = peft.load(ours, tmp_path / f"theirs-{projection}")
        for batch in batches:
            np.testing.assert_allclose(run(model, batch)["logits"], torch_logits(theirs, batch), atol=1e-4)


@pytest.mark.slow
def test_files(bert, key, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = prefixed(heads.classifier(bert, 2, key=key))
    folder = peft.save(model, tmp_path / "a")
    tensors = load_file(folder / peft.WEIGHTS)
    flat = tensors["prompt_embeddings"].reshape(LENGTH, 2, 2, 12)
    for layer, pair in enumerate(pairs(model)):
        for which, expected in enumerate(pair):
            np.testing.assert_array_equal(flat[:, layer, which], expected)
    back = peft.load(bert, folder)
    assert all(map(np.array_equal, jax.tree.leaves(back.params), jax.tree.leaves(model.params)))
    for other in ("distilbert", "vit"):
        with pytest.raises(
            ValueError, match=f"PEFT runs prefixes of bert and roberta here, this model is {other}"
        ):
            peft.save(prefixed(small(other)), tmp_path / "b")
    save_file({"prompt_embeddings": flat[:, 0].reshape(LENGTH, -1).copy()}, folder / peft.WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"has shape \(3, 24\), expected \(3, 48\)"):
        peft.load(bert, folder)
