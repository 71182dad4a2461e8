import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune
from jtl.model import linen
from jtl.models import ARCHITECTURES
from jtl.tasks import Seq2Seq, generate, teacher_forcing
from jtl.train import make_step
from jtl.wrap import function

V, END, START = 17, 1, 0
SIZES = {
    "t5": dict(vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0),
    "whisper": dict(vocab_size=V, num_mel_bins=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
                    encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=6,
                    max_target_positions=9, decoder_start_token_id=START, bos_token_id=START, eos_token_id=END,
                    pad_token_id=2, suppress_tokens=None, begin_suppress_tokens=None),
}  # fmt: skip


def random_model(name):
    architecture = ARCHITECTURES[name]
    config = architecture.config(**SIZES[name])
    module = architecture.module(config)
    fields = {field: jnp.asarray(value) for field, value in architecture.example(config).items()}
    return linen(module, jax.jit(module.init)(jax.random.key(0), **fields)).replace(config=config)


def pairs(name, rng, rows=3, length=5):
    """Something to read, answers that end, and their masks, padded on the right, on the left and not at all."""
    answers = rng.integers(3, V, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.int32)
    mask[0, -2:] = mask[1, :1] = 0
    for row, real in zip(answers, mask, strict=True):
        row[np.flatnonzero(real)[-1]] = END
    if name == "whisper":
        return {"log_mel": rng.normal(size=(rows, 12, 5)).astype(np.float32)}, answers, mask
    ids = rng.integers(3, V, (rows, 6)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": (rng.random((rows, 6)) < 0.8).astype(np.int32)}, answers, mask


def test_fields():
    """By hand; padding on either side comes to stand behind."""
    answers = np.array([[7, 8, 1], [9, 1, 0], [0, 9, 1]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1]])
    fields = teacher_forcing(answers, mask, start_id=4)
    assert fields["labels"].tolist() == [[7, 8, 1], [9, 1, -100], [9, 1, -100]]
    assert fields["decoder_input_ids"].tolist() == [[4, 7, 8], [4, 9, 1], [4, 9, 1]]
    assert fields["decoder_attention_mask"].tolist() == [[1, 1, 1]] * 3
    bare = teacher_forcing(answers, start_id=4)
    assert bare["labels"].tolist() == answers.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_against_numpy(name):
    """Each token of each answer from a forward over the answer's own tokens before it, and no others."""
    model, rng = random_model(name), np.random.default_rng(0)
    read, answers, mask = pairs(name, rng)
    batch = read | teacher_forcing(answers, mask, start_id=START)
    value, aux = jax.jit(Seq2Seq())(model, batch, None)
    forward = jax.jit(lambda model, batch: model(batch)["token_logits"])
    losses, hits = [], []
    for row in range(len(answers)):
        told = [START]
        for token in answers[row][mask[row] == 1]:
            own = {field: value[row : row + 1] for field, value in read.items()}
            words = np.array([told + [5] * (6 - len(told))], np.int32)  # what follows is not seen
            logits = np.asarray(
                forward(model, own | {"decoder_input_ids": words})[0, len(told) - 1], np.float64
            )
            losses.append(np.log(np.exp(logits).sum()) - logits[token])
            hits.append(logits.argmax() == token)
            told.append(int(token))
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["token_accuracy"], np.mean(hits), rtol=1e-6)
    assert float(aux.metrics["tokens"]) == mask.sum()
    weighted = Seq2Seq()(model, batch | {"weight": np.array([0, 0, 1], np.float32)}, None)[0]
    np.testing.assert_allclose(weighted, np.mean(losses[-5:]), rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_learned_is_written(name, key):
    """Full training of T5 and LoRA of Whisper: after it, generate gives the answers."""
    model, rng = random_model(name), np.random.default_rng(1)
    read = pairs(name, rng)[0]
    answers = rng.integers(3, V, (3, 5)).astype(np.int32)
    answers[:, -1] = END
    batch = read | teacher_forcing(answers, start_id=START)
    if name == "whisper":
        model = adapters.lora(
            model, rank=4, where="decoder/.*/(query|value|output|intermediate)|.*word", key=key
        )
    labels = finetune.train_only(model, ".*/lora/.*" if name == "whisper" else ".*")
    step = make_step(Seq2Seq(), optax.adam(2e-2), labels)
    state = step.init(model, key)
    for _ in range(150):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.1
    written = generate(state.model, None, max_new_tokens=5, eos_id=END, encoder=read)
    np.testing.assert_array_equal(written, answers)


def test_errors():
    given = function(lambda params, logits: {"token_logits": logits}, {})
    fields = teacher_forcing(np.ones((2, 3), np.int32), start_id=0) | {"logits": jnp.zeros((2, 3, V))}
    assert np.isfinite(Seq2Seq()(given, fields, None)[0])
    assert np.isnan(Seq2Seq()(given, fields | {"labels": np.full((2, 3), V)}, None)[0])
    assert float(Seq2Seq()(given, fields | {"labels": np.full((2, 3), -100)}, None)[0]) == 0
    with pytest.raises(ValueError, match=r"token_logits \(B, L, V\) for labels \(2, 3\)"):
        Seq2Seq()(given, fields | {"logits": jnp.zeros((2, 2, V))}, None)
    with pytest.raises(KeyError, match="'labels', which jtl.tasks.teacher_forcing makes"):
        Seq2Seq()(given, {"logits": jnp.zeros((2, 3, V))}, None)
    with pytest.raises(KeyError, match="gives \\['features'\\]"):
        Seq2Seq()(function(lambda params, labels: labels, {}), fields, None)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SIZES)
def test_loss_and_gradient_of_transformers(name, seed, tmp_path):
    import torch
    import transformers

    from jtl import save
    from jtl.tree import flatten

    model, rng = random_model(name), np.random.default_rng(seed)
    read, answers, mask = pairs(name, rng)
    fields = teacher_forcing(answers, mask, start_id=START)
    theirs = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForSpeechSeq2Seq
    theirs = theirs.from_pretrained(save(model, tmp_path / "model")).eval()
    inputs = {field: torch.tensor(value) for field, value in read.items()}
    if name == "whisper":
        inputs = {"input_features": inputs["log_mel"].transpose(1, 2)}
    loss = theirs(**inputs, labels=torch.tensor(np.asarray(fields["labels"])).long()).loss
    loss.backward()
    batch = read | fields
    value, slope = jax.value_and_grad(lambda model: Seq2Seq()(model, batch, None)[0])(model)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    word = {"t5": "embeddings/word", "whisper": "decoder/embeddings/word"}[name]
    expected = theirs.get_input_embeddings().weight.grad.numpy()
    np.testing.assert_allclose(flatten(slope.params)[f"{word}/embedding"], expected, atol=1e-5)
