"""On-policy and sequence-level distillation: texts that the student or the teacher writes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import distill
from jtl.model import linen
from jtl.models.llama import Llama
from jtl.models.llama_config import LlamaConfig
from jtl.train import make_step

V, P = 23, 3


def llama(seed, layers):
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    module = Llama(config)
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
    return linen(module, variables).replace(config=config)


@pytest.fixture(scope="module")
def student():
    return llama(0, 1)


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(1), (3, 7), 0, V)
    mask = jnp.array([[1] * 7, [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "weight": jnp.ones(3), "label": jnp.zeros(3, jnp.int32)}


def test_what_is_written_is_what_the_model_finds_likeliest(student, batch):
    found = distill.sample_continuations(
        student, {**batch, "teacher/token_logits": 0}, prompt=P, temperature=0.0
    )
    assert set(found) == {"input_ids", "attention_mask", "weight", "continuation"}
    assert found["input_ids"].shape == (3, 7)
    prompts = [[int(t) for t in ids[:P][np.asarray(mask[:P]) > 0]] for ids, mask in zip(
        batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    forward = jax.jit(lambda ids: student({"input_ids": ids})["token_logits"])
    for row, text in enumerate(prompts):
        for _ in range(7 - P):
            padded = jnp.array([text + [0] * (7 - len(text))])
            text.append(int(forward(padded)[0, len(text) - 1].argmax()))
        real = np.asarray(found["attention_mask"][row]) > 0
        assert np.asarray(found["input_ids"][row])[real].tolist() == text


def test_the_written_part_counts_until_it_ends(student, batch):
    first = distill.sample_continuations(student, batch, prompt=P, temperature=0.0)
    end = int(first["input_ids"][0, P + 1])  # what the first text writes second
    found = distill.sample_continuations(student, batch, prompt=P, temperature=0.0, eos_id=end)
    written = np.asarray(found["input_ids"][0, P:])
    stop = P + written.tolist().index(end) + 1
    assert found["attention_mask"][0].tolist() == [1] * stop + [0] * (7 - stop)
    assert found["continuation"][0].tolist() == [0] * (P - 1) + [1] * (stop - P) + [0] * (8 - stop)
    assert found["attention_mask"][1].tolist()[:P] == [0, 1, 1]
    own = distill.mask_continuations(batch, prompt=P)["continuation"]
    assert own.tolist() == [[0, 0, 1, 1, 1, 1, 0], [0] * 7, [0, 0, 1, 0, 0, 0, 0]]


def test_draws_follow_the_key(student, batch):
    draws = [
        distill.sample_continuations(student, batch, prompt=P, key=jax.random.key(seed))["input_ids"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    with pytest.raises(ValueError, match="at most 6 of 7 tokens, got 7"):
        distill.sample_continuations(student, batch, prompt=7, key=jax.random.key(0))


def test_a_student_learns_from_its_own_mistakes(student, batch):
    teacher = llama(5, 2)
    loss = distill.Distill(teacher, distill.SequenceKD("jsd", beta=0.5, mask="continuation"))
    step = make_step(loss, optax.adam(3e-2))
    state = step.init(jax.tree.map(jnp.copy, student), jax.random.key(0))
    losses = []
    for i in range(12):
        own = distill.sample_continuations(state.model, batch, prompt=P, key=jax.random.key(i))
        state, metrics = step(state, own)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
