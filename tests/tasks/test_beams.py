"""Beam search: against all texts there are, against greedy, and live against `transformers`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import IDS, LEFT, SIZES, L, V, random_model

from jtl import load, save
from jtl.model import linen
from jtl.models.gpt2 import GPT2, GPT2Config
from jtl.models.llama_config import LlamaConfig, MistralConfig
from jtl.tasks import beam_search, generate
from jtl.tasks.beams import _search

END = 7


@pytest.fixture(scope="module")
def model():
    return random_model(LlamaConfig(**SIZES))


def log_probabilities(model, ids, mask, texts):
    """Of each of the continuations ``texts`` (C, N) of one padded text, by a forward over all of it: (C, N)."""
    own = np.asarray(ids)[np.asarray(mask) == 1]
    whole = np.concatenate([np.tile(own, (len(texts), 1)), texts], 1).astype(np.int32)
    logits = np.asarray(
        jax.jit(lambda model, x: model({"input_ids": x})["token_logits"])(model, whole), np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = len(own) - 1 + np.arange(texts.shape[1])
    return log_p[np.arange(len(texts))[:, None], at[None], texts]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_a_wide_search_finds_the_best_of_all_texts(penalty):
    """Of six words and three tokens, by 200 beams, which are all there are, padded on the left."""
    model = random_model(LlamaConfig(**SIZES | {"vocab_size": 6}))
    ids, mask, N, end = IDS[:2] % 6, LEFT[:2], 3, 4
    found = beam_search(model, ids, mask, beams=200, max_new_tokens=N, length_penalty=penalty, eos_id=end)
    texts = {  # the end stands in all places after the first
        tuple(text[: text.index(end) + 1] if end in text else text)
        for text in itertools.product(range(6), repeat=N)
    }
    padded = np.array([[*text, *[end] * (N - len(text))] for text in texts])
    lengths = np.array([len(text) for text in texts])
    counts = np.arange(N) < lengths[:, None]
    for row in range(2):
        scores = (log_probabilities(model, ids[row], mask[row], padded) * counts).sum(1) / lengths**penalty
        order = np.argsort(-scores)[:20]
        np.testing.assert_allclose(found.scores[row, :20], scores[order], rtol=1e-4)
        np.testing.assert_array_equal(found.tokens[row, :20], padded[order])


def test_one_beam_is_greedy(model):
    for end in (None, END):
        found = beam_search(model, IDS, LEFT, beams=1, max_new_tokens=5, eos_id=end)
        np.testing.assert_array_equal(
            found.tokens[:, 0], generate(model, IDS, LEFT, max_new_tokens=5, eos_id=end)
        )


def test_scores_are_those_of_the_texts_and_beat_greedy(model):
    found = beam_search(model, IDS, LEFT, beams=5, max_new_tokens=6, length_penalty=0.0)
    greedy = np.asarray(generate(model, IDS, LEFT, max_new_tokens=6))
    for row in range(3):
        own = log_probabilities(model, IDS[row], LEFT[row], np.asarray(found.tokens[row])).sum(1)
        np.testing.assert_allclose(found.scores[row], own, rtol=1e-4)
        assert (np.diff(own) <= 1e-5).all() and len({*map(tuple, np.asarray(found.tokens[row]))}) == 5
        assert own[0] >= log_probabilities(model, IDS[row], LEFT[row], greedy[row : row + 1]).sum() - 1e-5
    best = generate(model, IDS, LEFT, max_new_tokens=6, beams=5, length_penalty=0.0)
    np.testing.assert_array_equal(best, found.tokens[:, 0])


def test_rows_do_not_meet_and_padding_does_not_matter(model):
    """Each text alone, on either side of its padding, gives what it gives in a batch; the penalty is no constant."""
    before = _search._cache_size()
    search = dict(beams=3, max_new_tokens=6, eos_id=END)
    whole = beam_search(model, IDS, LEFT, **search)
    assert not np.array_equal(
        whole.scores, beam_search(model, IDS, LEFT, **search, length_penalty=0.5).scores
    )
    assert _search._cache_size() == before + 1
    turned = np.stack([np.roll(row, real.sum()) for row, real in zip(IDS, LEFT, strict=True)])
    np.testing.assert_array_equal(beam_search(model, turned, LEFT[:, ::-1], **search).tokens, whole.tokens)
    for row in range(3):
        alone = beam_search(model, IDS[row : row + 1], LEFT[row : row + 1], **search)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """No odd tokens, and no token after itself."""

    def __call__(self, logits, new, i):
        last = jnp.where(i > 0, jnp.take(new, i - 1, axis=1), -1)
        words = jnp.arange(logits.shape[1])[None]
        return jnp.where((words % 2 == 1) | (words == last[:, None]), -jnp.inf, logits)


def test_a_rule_holds(model):
    tokens = np.asarray(beam_search(model, IDS, LEFT, beams=4, max_new_tokens=6, rule=Forbidden()).tokens)
    assert not (tokens % 2).any() and (np.diff(tokens, axis=2) != 0).all()


def test_errors(model):
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        beam_search(model, IDS, beams=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        beam_search(model, IDS, beams=2, max_new_tokens=0)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(6))
def test_beams_of_transformers(seed, tmp_path):
    """All beams and their scores, padded on the left, with and without an end, of drawn widths and penalties."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    eos = int(rng.integers(3, V)) if seed else None
    tokens = dict(bos_token_id=1, eos_token_id=eos, pad_token_id=0)
    kind = ("llama", "window", "gpt2")[seed % 3]
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=V, n_positions=40, n_embd=16, n_layer=2, n_head=4, initializer_range=0.6, **tokens
        )
        variables = jax.jit(GPT2(config).init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
        model = linen(GPT2(config), variables).replace(config=config)
    else:
        config = (
            MistralConfig(**SIZES, sliding_window=4, **tokens)
            if kind == "window"
            else LlamaConfig(**SIZES, **tokens)
        )
        model = random_model(config)
    folder = save(model, tmp_path / "tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = rng.integers(3, V, (3, L)).astype(np.int32)
    drawn = ((2, 1.0, False), (3, 0.0, True)) if seed < 3 else ((5, 2.0, False), (4, -1.0, False))
    for beams, penalty, early in drawn:  # of every kind of model
        expected = theirs.generate(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(LEFT),
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            early_stopping=early,
            max_new_tokens=12,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = beam_search(
            load(folder), ids, LEFT, beams=beams, max_new_tokens=12, length_penalty=penalty, early_stopping=early,
            eos_id=eos,
        )  # fmt: skip
        new = expected.sequences[:, L:].numpy()
        new = np.pad(new, ((0, 0), (0, 12 - new.shape[1])), constant_values=0)
        ended = np.zeros(new.shape, bool) if eos is None else np.cumsum(new == eos, 1) > 0
        ours = np.asarray(found.tokens).reshape(new.shape)
        np.testing.assert_array_equal(ours, np.where(ended, eos or 0, new))
        scores = np.asarray(found.scores).ravel()
        np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), rtol=1e-4)
