import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters, heads
from jtl.data.batches.loader import Batches
from jtl.data.encode.windows import Windows
from jtl.model import linen
from jtl.models.bert import Bert, BertConfig
from jtl.pretrained import load, save
from jtl.tasks import Spans, best_spans, find_spans, span_head
from jtl.tasks.spans import log_probabilities
from jtl.wrap import function

B, L = 4, 9
CONFIG = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    module = Bert(CONFIG)
    ids = jnp.zeros((1, L), jnp.int32)
    body = linen(module, module.init(jax.random.key(0), ids, ids + 1)).replace(config=CONFIG)
    return span_head(body, key=jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = np.ones((B, L), np.int32)
    mask[1, 6:] = 0
    return {
        "input_ids": rng.integers(0, 50, (B, L)).astype(np.int32),
        "attention_mask": mask,
        "start": np.array([3, 2, 0, 1], np.int32),
        "end": np.array([5, 5, 0, 8], np.int32),
        "weight": np.array([1, 1, 1, 0], np.float32),
    }


def test_against_numpy(model, batch):
    value, aux = jax.jit(lambda m, b: Spans().value(m, m(b), b, None))(model, batch)
    logits = np.asarray(model(batch)["span_logits"], np.float64)
    losses, hits = [], []
    for row in range(3):
        real = logits[row, : batch["attention_mask"][row].sum()]
        log_p = real - np.log(np.exp(real).sum(0))
        target = (batch["start"][row], batch["end"][row])
        losses.append(-np.mean([log_p[place, side] for side, place in enumerate(target)]))
        hits.append(all(log_p[:, side].argmax() == place for side, place in enumerate(target)))
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(aux["span_accuracy"], np.mean(hits), rtol=1e-6)


def test_the_padded_length_changes_nothing(model, batch):
    loss = jax.jit(lambda m, b: Spans().value(m, m(b), b, None)[0])
    longer = {
        name: np.pad(field, ((0, 0), (0, 4))) if field.ndim == 2 else field for name, field in batch.items()
    }
    np.testing.assert_allclose(loss(model, batch), loss(model, longer), rtol=1e-5)


def test_a_place_outside_the_row_is_nan_and_rows_of_no_weight_do_not_count(model, batch):
    loss = lambda b: float(Spans().value(model, model(b), b, None)[0])  # noqa: E731
    for place in (-1, 6, L):  # before the row, its padding, and behind all
        assert np.isnan(loss(batch | {"end": np.array([5, place, 0, 8], np.int32)})), place
    assert loss(batch | {"end": np.array([5, 5, 0, L], np.int32)}) == loss(batch)


def test_best_spans_are_those_of_brute_force():
    rng = np.random.default_rng(1)
    log_p = rng.normal(size=(20, L, 2)).astype(np.float32)
    inside = np.zeros((20, L), np.int32)
    inside[:, 3:8] = 1
    found = jax.jit(best_spans, static_argnames="longest")(log_p, inside, longest=3)
    for row in range(20):
        pairs = [(i, j) for i in range(3, 8) for j in range(i, min(i + 3, 8))]
        best = max(pairs, key=lambda pair: log_p[row, pair[0], 0] + log_p[row, pair[1], 1])
        assert (int(found.start[row]), int(found.end[row])) == best
        np.testing.assert_allclose(
            found.log_probability[row], log_p[row, best[0], 0] + log_p[row, best[1], 1], rtol=1e-5
        )


def test_find_spans_gives_the_windows_in_their_order():
    """The model scores a token by its id: the windows, of other lengths, come back as they were."""
    lengths = [9, 4, 7]
    starts = np.cumsum([0, *lengths])
    tokens = np.concatenate([np.r_[0, 1, np.arange(2, n)] for n in lengths]).astype(np.int32)
    tokens[[starts[0] + 5, starts[1] + 2, starts[2] + 3]] = 40  # the best first token
    windows = Windows(
        tokens, np.stack([np.arange(20), np.arange(20) + 1], 1), starts,
        np.array([[2, n - 1] for n in lengths], np.int32), np.zeros((3, 2), np.int32), np.arange(3), 0, 9, False,
    )  # fmt: skip
    score = function(lambda p, input_ids: {"span_logits": jnp.stack([input_ids, 0 * input_ids], 2) / 4}, {})
    found = find_spans(score, Batches(windows, 2, train=False, buckets=(9,)), longest=1)
    np.testing.assert_array_equal(found.start, [5, 2, 3])
    np.testing.assert_array_equal(found.end, found.start)


def test_a_saved_model_comes_back_with_its_head(model, batch, tmp_path):
    """As transformers has no pooler there, so has the file: it is made anew, and nothing reads it."""
    folder = save(model, tmp_path / "model")
    back = load(folder, key=jax.random.key(5))
    assert heads.find(back) == heads.find(model)
    np.testing.assert_array_equal(back(batch)["span_logits"], model(batch)["span_logits"])
    with pytest.raises(ValueError, match="pooler"):
        load(folder)
    with pytest.raises(ValueError, match="no classifier"):
        save(model, tmp_path / "named", id2label={0: "a", 1: "b"})


def test_peft_has_no_place_for_the_head(model, tmp_path):
    with pytest.raises(ValueError, match="a head that gives 'logits', and this one gives 'span_logits'"):
        adapters.peft.save(adapters.lora(model, key=jax.random.key(0)), tmp_path / "adapter")


def test_errors(batch):
    bare = function(lambda params, input_ids: {"sequence": input_ids}, {})
    with pytest.raises(KeyError, match="span_head.*gives \\['sequence'\\]"):
        Spans()(bare, batch, None)
    with pytest.raises(ValueError, match="width=D"):
        span_head(bare, key=jax.random.key(0))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_transformers_opens_it_and_computes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    from experiments.models.random_models import batch as draw_batch
    from experiments.models.random_models import build, files, settings

    rng = np.random.default_rng(4)
    theirs = build(name, settings(name, rng))
    written, _ = files(theirs)
    theirs.save_pretrained(tmp_path / "body")
    body = load(tmp_path / "body", key=jax.random.key(0))
    folder = save(span_head(body, key=jax.random.key(1)), tmp_path / "qa")
    other, info = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = draw_batch(name, written, rng, padded=False)
    rows, length = inputs["input_ids"].shape
    spans = {"start": rng.integers(0, length, rows), "end": rng.integers(0, length, rows)}
    out = other.eval()(
        **{field: torch.tensor(np.asarray(value)).long() for field, value in inputs.items()},
        start_positions=torch.tensor(spans["start"]),
        end_positions=torch.tensor(spans["end"]),
    )
    model = load(folder, key=jax.random.key(2))
    outputs = model(inputs)
    np.testing.assert_allclose(
        outputs["span_logits"][..., 0], out.start_logits.detach().numpy(), rtol=1e-4, atol=1e-5
    )
    value, _ = Spans().value(model, outputs, {**inputs, **spans}, None)
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-4)
    real = log_probabilities(outputs, inputs)
    assert np.allclose(np.exp(real).sum(1), 1, atol=1e-5)
