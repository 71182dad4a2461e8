from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import binom

from jtl import finetune, heads
from jtl.model import Mode, linen, remove
from jtl.models.bert import Bert, BertConfig
from jtl.tasks import Classify, MaskedLM, mask, masked_head
from jtl.train import make_step
from jtl.tree import flatten

V, D, L, B = 50, 8, 12, 4
PAD, CLS, SEP, MASK = range(4)
TOKENIZER = SimpleNamespace(mask_token_id=MASK, all_special_ids=[SEP, CLS, PAD, MASK])
CONFIG = BertConfig(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=L,
    layer_norm_eps=1e-3,
    initializer_range=0.3,
)
TABLE = "embeddings/word/embedding"


def texts(rows, length, seed=0):
    """[CLS] words [SEP] and padding: ids, mask, and where the words are."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, rows)
    lengths[0] = 2  # a text without words
    place = np.arange(length)
    ids = rng.integers(4, V, (rows, length))
    ids = np.where(place == 0, CLS, np.where(place == lengths[:, None] - 1, SEP, ids))
    real = place < lengths[:, None]
    return np.where(real, ids, PAD).astype(np.int32), real.astype(np.int32), ids * real > 3


@pytest.fixture(scope="module")
def batch():
    ids, real, _ = texts(B, L)
    return {"input_ids": ids, "attention_mask": real, "weight": np.array([1, 1, 1, 0], np.float32)}


@pytest.fixture(scope="module")
def bare(batch):
    module = Bert(CONFIG)
    variables = module.init(jax.random.key(0), jnp.asarray(batch["input_ids"]))
    return linen(module, variables).replace(config=CONFIG)


@pytest.fixture(scope="module")
def model(bare):
    return masked_head(bare, TOKENIZER, key=jax.random.key(1))


def drawn(ids, real, key, **settings):
    settings = {"mask_id": MASK, "special": (PAD, CLS, SEP, MASK), "vocabulary": V} | settings
    return mask(ids, real, key, **settings)


def test_how_many_words_are_masked_and_what_becomes_of_them():
    ids, real, words = texts(4000, 32)
    found = jax.jit(drawn)(ids, real, jax.random.key(0))
    n = words.sum(1)
    expected = np.where(n > 0, np.maximum(np.round(0.15 * n), 1), 0)
    np.testing.assert_array_equal(found.weight.sum(1), expected)
    assert found.positions.shape == (4000, 5)
    chosen = np.asarray(found.weight) > 0
    row, place = np.nonzero(chosen)[0], np.asarray(found.positions)[chosen]
    assert words[row, place].all() and len({*zip(row.tolist(), place.tolist(), strict=True)}) == len(row)
    new, old = np.asarray(found.input_ids)[row, place], ids[row, place]
    np.testing.assert_array_equal(np.asarray(found.target)[chosen], old)
    untouched = np.ones(ids.shape, bool)
    untouched[row, place] = False
    np.testing.assert_array_equal(np.asarray(found.input_ids)[untouched], ids[untouched])
    # A random id is [MASK] or the old one now and then.
    total = len(row)
    for count, share in (
        ((new == MASK).sum(), 0.8 + 0.1 / V),
        ((new == old).sum(), 0.1 + 0.1 / V),
        (((new != MASK) & (new != old)).sum(), 0.1 * (V - 2) / V),
    ):
        low, high = binom.interval(0.9999, total, share)
        assert low <= count <= high
    # Every word of a text is as likely as another: those of the longest texts, by place.
    longest = n == 30
    hits = np.zeros(ids.shape)
    hits[row, place] = 1
    low, high = binom.interval(0.9999, longest.sum(), round(0.15 * 30) / 30)
    by_place = hits[longest][:, 1:31].sum(0)
    assert (low <= by_place).all() and (by_place <= high).all()


def test_the_key_decides():
    ids, real, words = texts(8, 32)
    one, same, other = (drawn(ids, real, jax.random.key(k)) for k in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert (np.asarray(one.input_ids) != np.asarray(other.input_ids)).any()
    everywhere = drawn(np.full((2, 10), 7, np.int32), None, jax.random.key(0), rate=0.5)
    np.testing.assert_array_equal(everywhere.weight, np.ones((2, 5)))


def test_loss_against_numpy(model, batch):
    key = jax.random.key(3)
    outputs = model(batch, key=key)
    value, metrics = MaskedLM().value(model, outputs, batch, None)
    found = drawn(batch["input_ids"], batch["attention_mask"], jax.random.split(key)[0])
    # Without a key there are logits everywhere, and nothing is masked.
    logits = np.asarray(model(batch | {"input_ids": found.input_ids})["token_logits"], np.float64)
    assert logits.shape == (B, L, V)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, columns = np.nonzero((np.asarray(found.weight) > 0) & (batch["weight"] > 0)[:, None])
    place = np.asarray(found.positions)[rows, columns]
    target = np.asarray(found.target)[rows, columns]
    assert len(rows) > 1 and float(metrics["tokens"]) == len(rows)
    np.testing.assert_allclose(value, -log_p[rows, place, target].mean(), rtol=1e-5)
    hits = log_p[rows, place].argmax(-1) == target
    np.testing.assert_allclose(metrics["token_accuracy"], hits.mean(), rtol=1e-6)
    nothing = MaskedLM().value(model, outputs, batch | {"weight": np.zeros(B, np.float32)}, None)[0]
    assert float(nothing) == 0


def test_the_head_is_tied(model, bare, batch):
    """The gradient of the table is the sum of those of its two uses; it is one leaf, and it trains."""
    paths = set(flatten(model.params)) - set(flatten(bare.params))
    assert paths == {"mlm/dense/kernel", "mlm/dense/bias", "mlm/norm/scale", "mlm/norm/bias", "mlm/bias"}
    key, technique = jax.random.key(5), model.techniques[-1]

    def loss(below, above):
        """The model with one table below and another above."""
        params = lambda table: {  # noqa: E731
            **model.params, "embeddings": {**model.params["embeddings"], "word": {"embedding": table}}
        }  # fmt: skip
        forward = lambda variables, *rest: model.base({"params": params(below)}, *rest)  # noqa: E731
        outputs, _ = technique.wrap(forward)({"params": params(above)}, batch, Mode(), key)
        return MaskedLM().value(model, outputs, batch, None)[0]

    table = model.params["embeddings"]["word"]["embedding"]
    below, above = jax.grad(loss, (0, 1))(table, table)
    assert float(jnp.abs(below).max()) > 1e-4 and float(jnp.abs(above).max()) > 1e-4
    whole = jax.grad(lambda m: MaskedLM().value(m, m(batch, key=key), batch, None)[0])(model)
    np.testing.assert_allclose(flatten(whole.params)[TABLE], below + above, atol=1e-6)


@pytest.mark.slow
def test_training_in_one_program(model, batch):
    ids, real, _ = texts(16, L, seed=1)
    batch = {"input_ids": ids, "attention_mask": real, "label": np.zeros(16, np.int32)}
    both = heads.classifier(model, 2, key=jax.random.key(2), on="pooled")
    frozen = finetune.train_only(both, "mlm/.*")
    for loss, labels in ((MaskedLM(), frozen), (MaskedLM() + 0.1 * Classify(), None)):
        step = make_step(loss, optax.adam(1e-2), labels)
        state = step.init(both, jax.random.key(0))
        losses = []
        for _ in range(60):
            state, metrics = step(state, batch)
            losses.append(float(metrics["MaskedLM" if labels is None else "loss"]))
        assert step._compiled._cache_size() == 1
        assert len(set(losses)) == 60  # each step masks other words
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05
        moved = {p for p, x in flatten(state.model.params).items() if (x != flatten(both.params)[p]).any()}
        assert (TABLE in moved) == (labels is None) and "mlm/bias" in moved


def test_without_it_the_model_is_what_it_was(model, bare, batch):
    off = remove(model, "mlm")
    assert jax.tree.structure(off) == jax.tree.structure(bare)
    chex.assert_trees_all_equal(off, bare)
    with pytest.raises(KeyError, match="no technique called 'mlm'"):
        remove(bare, "mlm")
    kept = masked_head(bare, TOKENIZER, key=jax.random.key(9), params=model.params["mlm"])
    chex.assert_trees_all_equal(kept, model)
    # And without a key no other output has changed.
    with_head = model(batch)
    chex.assert_trees_all_equal({n: with_head[n] for n in ("features", "pooled", "sequence")}, bare(batch))


def test_errors(model, bare, batch):
    with pytest.raises(ValueError, match="between 0 and 1, got 15"):
        masked_head(bare, TOKENIZER, key=jax.random.key(0), rate=15.0)
    with pytest.raises(ValueError, match="no mask token"):
        masked_head(bare, SimpleNamespace(mask_token_id=None), key=jax.random.key(0))
    with pytest.raises(ValueError, match="the mask token is 99, and embeddings/word/embedding has"):
        masked_head(bare, SimpleNamespace(mask_token_id=99), key=jax.random.key(0))
    with pytest.raises(ValueError, match="near misses: .*embeddings/word/embedding"):
        masked_head(bare, TOKENIZER, key=jax.random.key(0), table="embedding/word/embedding")
    with pytest.raises(ValueError, match="already"):
        masked_head(model, TOKENIZER, key=jax.random.key(0))
    with pytest.raises(KeyError, match="and a key"):
        MaskedLM()(bare, batch, jax.random.key(0))


@pytest.mark.parity
def test_the_head_of_transformers():
    """Logits and the gradient of the tied table, of BertForMaskedLM with the same weights."""
    import torch
    import transformers

    from jtl.models.bert import tensors
    from jtl.tree import nest

    settings = {k: v for k, v in CONFIG.to_hf().items() if k not in ("model_type", "classifier_dropout")}
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**settings)).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.2 * torch.randn(value.shape)
    weights = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    names = tensors(CONFIG)
    # It has no pooler.
    body = {
        path: jnp.asarray(tensor.layout.to_jax(weights[f"bert.{tensor.key}"]))
        if not path.startswith("params/pooler")
        else jnp.zeros((D, D) if path.endswith("kernel") else D)
        for path, tensor in names.items()
    }
    at = "cls.predictions"
    head = {
        "dense/kernel": weights[f"{at}.transform.dense.weight"].T,
        "dense/bias": weights[f"{at}.transform.dense.bias"],
        "norm/scale": weights[f"{at}.transform.LayerNorm.weight"],
        "norm/bias": weights[f"{at}.transform.LayerNorm.bias"],
        "bias": weights[f"{at}.bias"],
    }
    bert = linen(Bert(CONFIG), nest(body)).replace(config=CONFIG)
    head = jax.tree.map(jnp.asarray, nest(head))
    ours = masked_head(bert, TOKENIZER, key=jax.random.key(0), params=head)

    ids, real, _ = texts(B, L)
    weight = real[..., None] * np.random.default_rng(0).normal(size=(B, L, V)).astype(np.float32)
    out = theirs(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(real).long()).logits
    batch = {"input_ids": ids, "attention_mask": real}
    found = np.asarray(ours(batch)["token_logits"])
    wanted = out.detach().numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    (out * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    gradient = jax.grad(lambda m: (m(batch)["token_logits"] * weight).sum())(ours)
    wanted = theirs.bert.embeddings.word_embeddings.weight.grad.numpy()
    found = np.asarray(
        flatten(gradient.params)[TABLE]
    )  # padding gets no loss: torch gives it no gradient from below
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
