"""Prompt tuning: the definition in NumPy, what it leaves alone, bad input, and the real PEFT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_encoder import FIRST, encode, pooled, small, texts, torch_logits, torch_model

from jtl import adapters, finetune, heads, pretrained, tree
from jtl import model as models
from jtl.adapters import SiteError, peft
from jtl.adapters.peft import AdapterFileError
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


def prompted(model, **options):
    """With vectors that are no embeddings, as after training."""
    model = adapters.prompt(model, length=LENGTH, key=jax.random.key(1), **options)
    vectors = 0.5 * jax.random.normal(jax.random.key(2), (LENGTH, 12))
    return model.with_params(
        tree.overlay(model.params, tree.nest({"embeddings/word/prompt/vectors": vectors}), replace=True)
    )


def vectors(model):
    return model.params["embeddings"]["word"]["prompt"]["vectors"]


# Programs that must agree to the bit: conftest's first level of LLVM rounds otherwise in each of them.
run = jax.jit(lambda model, batch: model(batch), compiler_options={"xla_backend_optimization_level": 3})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("first", ["prompt", "text"])
def test_it_is_the_definition(name, plain, first, side):
    """Each row of a padded batch is what NumPy makes of that text alone."""
    model = prompted(plain, pooled=first)
    batch, rows, types = texts(name, left=side == "left")
    found = run(model, batch)
    L = batch["input_ids"].shape[1]
    assert found["sequence"].shape == (len(rows), L, 12)
    for i, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        # BERT and DistilBERT number columns, so padding on the left moves their texts; RoBERTa numbers tokens.
        start = L - len(row) if side == "left" else 0
        text = FIRST[name] + LENGTH + np.arange(len(row)) + (0 if name == "roberta" else start)
        positions = np.concatenate([FIRST[name] + np.arange(LENGTH), text])
        states = encode(model, row, kinds, positions=positions, prompt=vectors(model))
        np.testing.assert_allclose(found["sequence"][i, start : start + len(row)], states[LENGTH:], atol=1e-4)
        np.testing.assert_allclose(found["features"][i], states[LENGTH:].mean(0), atol=1e-4)
        if first == "prompt":
            np.testing.assert_allclose(found["pooled"][i], pooled(plain, states[0]), atol=1e-4)
        elif not start:  # on the left of a text lies padding, which a model without a prompt would pool too
            np.testing.assert_allclose(found["pooled"][i], pooled(plain, states[LENGTH]), atol=1e-4)


def test_without_mask_every_token_is_real(name, plain):
    model = prompted(plain)
    batch, *_ = texts(name, (4, 4))
    bare = {field: value for field, value in batch.items() if field != "attention_mask"}
    for output, value in run(model, batch).items():
        np.testing.assert_array_equal(run(model, bare)[output], value)


def test_it_starts_from_tokens(bert):
    table = bert.params["embeddings"]["word"]["embedding"]
    for ids, length, rows in (([7, 9], 5, [7, 9, 7, 9, 7]), ([5, 6, 7], 2, [5, 6])):
        model = adapters.prompt(bert, length=length, ids=ids, key=jax.random.key(0))
        np.testing.assert_array_equal(vectors(model), table[np.array(rows)])
    drawn = [
        np.asarray(vectors(adapters.prompt(bert, length=6, key=jax.random.key(seed)))) for seed in (0, 1)
    ]
    assert not np.array_equal(*drawn)
    assert all((row == np.asarray(table)).all(1).any() for row in drawn[0])


def test_a_prompt_of_tokens_is_those_tokens(bert):
    """A prompt of the embeddings of a text's first tokens computes what the model does with them in the text."""
    batch, *_ = texts("bert", (6, 6))
    batch["token_type_ids"][:, :2] = 0
    batch["input_ids"][:, :2] = [5, 8]
    rest = {field: value[:, 2:] for field, value in batch.items()}
    model = adapters.prompt(bert, length=2, ids=[5, 8], key=jax.random.key(0))
    whole, behind = run(bert, batch), run(model, rest)
    np.testing.assert_allclose(behind["sequence"], whole["sequence"][:, 2:], atol=1e-5)
    np.testing.assert_allclose(behind["pooled"], whole["pooled"], atol=1e-5)


def test_heads_read_the_text_in_any_order(bert, key):
    batch, *_ = texts("bert")
    module = heads.Classifier(2)
    for on in ("features", "pooled"):
        options = dict(on=on, width=12, key=key)
        before = prompted(heads.attach(bert, module, **options))
        after = heads.attach(prompted(bert), module, **options)
        np.testing.assert_array_equal(run(before, batch)["logits"], run(after, batch)["logits"])


def test_with_other_adapters(bert, key):
    batch, *_ = texts("bert")
    options = dict(rank=2, where="embeddings/word|.*/key", key=key)
    both = prompted(adapters.lora(bert, **options))
    expected = run(prompted(bert), batch)["features"]
    np.testing.assert_allclose(run(both, batch)["features"], expected, atol=1e-5)
    with pytest.raises(
        SiteError, match="place of embeddings/word, .* leaves of 'prompt' there: put 'prompt' in last"
    ):
        adapters.lora(prompted(bert), **options)
    low = run(models.cast(prompted(bert), jnp.bfloat16), batch)["features"]
    np.testing.assert_allclose(low, expected, atol=0.2)


def test_only_prompt_and_head_train(bert, key):
    batch, rows, _ = texts("bert")
    batch["label"] = np.arange(len(rows), dtype=np.int32) % 2
    model = prompted(heads.classifier(bert, 2, key=key))
    labels = finetune.train_only(model, ".*/prompt/.*|head/.*")
    step = make_step(Classify(), optax.adam(1e-2), labels)
    state = step.init(model, key)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    old, new = tree.flatten(model.params), tree.flatten(state.model.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {"embeddings/word/prompt/vectors", "head/out/kernel", "head/out/bias"}


def test_transformations(bert):
    """One trace for equal models; vmap over prompts; rematerialised gradients, and none that is zero."""
    batch, *_ = texts("bert")
    model = prompted(bert)
    counted = jax.jit(chex.assert_max_traces(lambda model, batch: model(batch)["features"], n=1))
    chex.clear_trace_counter()
    for equal in (model, prompted(bert)):
        counted.lower(equal, batch)

    def loss(prompt):
        leaves = tree.nest({"embeddings/word/prompt/vectors": prompt})
        whole = model.with_params(tree.overlay(model.params, leaves, replace=True))
        return (whole(batch)["features"] ** 2).sum()

    many = jnp.stack([vectors(model), -vectors(model)])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
    value, gradient = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(many[1])
    np.testing.assert_allclose(values[1], value, rtol=1e-5)
    np.testing.assert_allclose(gradients[1], gradient, atol=1e-4)
    assert (np.abs(gradient).max(1) > 1e-3).all()  # every vector is read


def test_bad_input(bert, key):
    with pytest.raises(ValueError, match="prompt: length must be at least 1, got 0"):
        adapters.prompt(bert, length=0, key=key)
    with pytest.raises(
        ValueError, match="prompt of length 16 and texts of length 1 need 17 positions; the model has 16"
    ):
        adapters.prompt(bert, length=16, key=key)
    with pytest.raises(ValueError, match="need 17 positions; the model has 16: cut texts to 10 tokens"):
        adapters.prompt(small("roberta"), length=6, key=key)({"input_ids": np.full((1, 11), 5, np.int32)})
    for ids in ([], [30], [-1]):
        with pytest.raises(ValueError, match="ids must be some of the vocabulary's tokens, 0 to 29, got"):
            adapters.prompt(bert, ids=ids, key=key)
    with pytest.raises(ValueError, match="the model has the prompt 'prompt' already; it can have one"):
        adapters.prompt(prompted(bert), name="other", key=key)
    for other in ("vit", "efficientnet_lite"):
        with pytest.raises(
            SiteError, match=f"needs word embeddings at 'embeddings/word', .*this model is {other}"
        ):
            adapters.prompt(small(other), key=key)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers
def test_peft_opens_ours_and_we_open_theirs(name, tmp_path):
    """The same logits, on texts padded on the right; with one on the left RoBERTa counts padding there."""
    import torch
    from peft import PeftModel, PromptTuningConfig, get_peft_model

    base = torch_model(name, tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    batches = [texts(name)[0], texts(name, (4, 4))[0]]
    if name != "roberta":
        batches.append(texts(name, left=True)[0])
    batches[1].pop("attention_mask")

    model = prompted(ours)
    peft.save(model, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    back = peft.load(ours, tmp_path / "ours")
    for batch in batches:
        logits = run(model, batch)["logits"]
        np.testing.assert_allclose(torch_logits(theirs, batch), logits, atol=1e-4)
        np.testing.assert_array_equal(run(back, batch)["logits"], logits)
    assert (back.techniques, tree.diff(back.params, model.params)) == (model.techniques, [])

    config = PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, token_dim=12, num_layers=2, num_attention_heads=3
    )
    theirs = get_peft_model(torch_model(name, tmp_path / "again"), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = peft.load(ours, tmp_path / "theirs")
    for batch in batches:
        np.testing.assert_allclose(run(model, batch)["logits"], torch_logits(theirs, batch), atol=1e-4)


def test_files(bert, key, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = prompted(heads.classifier(bert, 2, key=key))
    folder = peft.save(model, tmp_path / "a")
    tensors = load_file(folder / peft.WEIGHTS)
    assert {name: value.shape for name, value in tensors.items()} == {
        "prompt_embeddings": (LENGTH, 12),
        "base_model.classifier.weight": (2, 12),
        "base_model.classifier.bias": (2,),
    }
    with pytest.raises(
        ValueError, match="'prompt' leaves pooled to the text .* the head would read the prompt"
    ):
        peft.save(prompted(heads.classifier(bert, 2, key=key), pooled="text"), tmp_path / "b")
    with pytest.raises(ValueError, match=r"expected one adapter, found \['lora', 'prompt'\]: name one"):
        peft.save(prompted(adapters.lora(bert, rank=2, key=key)), tmp_path / "b")
    with pytest.raises(AdapterFileError, match="it is for a text model, this one is vit"):
        peft.load(small("vit"), folder)
    vectors_ = tensors["prompt_embeddings"]
    for changed, message in (
        ({"prompt_embeddings": vectors_[:, :8].copy()}, r"has shape \(3, 8\), expected \(3, 12\)"),
        ({"prompt_embeddings": vectors_[:2]}, r"has shape \(2, 12\), expected \(3, 12\)"),
        ({"base_model.prompt": vectors_, **tensors}, "'prompt' belongs to nothing in this model"),
        ({"classifier.weight": tensors["base_model.classifier.weight"]}, "'prompt_embeddings' is missing"),
        ({"score.weight": vectors_, **tensors}, "'score.weight' belongs to nothing in this model"),
    ):
        save_file(changed, folder / peft.WEIGHTS)
        with pytest.raises(AdapterFileError, match=message):
            peft.load(bert, folder)
