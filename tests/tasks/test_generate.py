import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters
from jtl.model import Model, cast, linen
from jtl.models import ARCHITECTURES
from jtl.models.bert import Bert, BertConfig
from jtl.models.llama import Llama
from jtl.models.llama_config import LlamaConfig, MistralConfig
from jtl.tasks import generate, stream, stream_text
from jtl.tasks.generate import _generate, _Settings, kept

V, L = 31, 6
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.6)  # fmt: skip
LEFT = np.array([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
IDS = np.random.default_rng(0).integers(3, V, (3, L)).astype(np.int32)


def random_model(config) -> Model:
    module = Llama(config)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return linen(module, variables).replace(config=config)


@pytest.fixture(scope="module")
def model():
    return random_model(LlamaConfig(**SIZES))


def without_cache(model, ids, mask, new):
    """The most likely continuations, each token of each row from a forward over all that precede it."""
    forward = jax.jit(
        lambda model, ids, mask: model({"input_ids": ids, "attention_mask": mask})["token_logits"]
    )
    rows = []
    for row, real in zip(ids, mask, strict=True):
        text = [int(i) for i in row[real == 1]]
        for _ in range(new):
            padded = np.array([text + [0] * (L + new - len(text))], np.int32)
            alone = (np.arange(L + new) < len(text)).astype(np.int32)[None]
            text.append(int(forward(model, padded, alone)[0, len(text) - 1].argmax()))
        rows.append(text[-new:])
    return np.array(rows)


@pytest.mark.parametrize("kind", ["llama", "window", "adapted"])
def test_greedy_is_what_whole_forwards_give(kind, model, key):
    """Padding on the left, on the right and none, in one batch of one program."""
    if kind == "window":
        model = random_model(MistralConfig(**SIZES, sliding_window=3))
    if kind == "adapted":
        model = adapters.lora(model, rank=2, where=".*/(query|value|gate)", key=key)
        model = model.with_params(jax.tree.map(lambda x: x + 0.05, model.params))
    expected = without_cache(model, IDS, LEFT, 7)
    assert len(np.unique(expected)) > 5
    before = _generate._cache_size()
    np.testing.assert_array_equal(generate(model, IDS, LEFT, max_new_tokens=7), expected)
    right = LEFT[:, ::-1]
    turned = np.stack([np.roll(row, real.sum()) for row, real in zip(IDS, LEFT, strict=True)])
    np.testing.assert_array_equal(generate(model, turned, right, max_new_tokens=7), expected)
    assert _generate._cache_size() == before + 1


def test_without_a_mask_and_from_one_token(model):
    expected = without_cache(model, IDS[:, :1], np.ones((3, 1), int), 4)
    np.testing.assert_array_equal(generate(model, IDS[:, :1], max_new_tokens=4), expected)


def test_an_ended_text_repeats_its_end(model):
    free = np.asarray(generate(model, IDS, LEFT, max_new_tokens=7))
    end = int(free[0, 2])
    found = np.asarray(generate(model, IDS, LEFT, max_new_tokens=7, eos_id=end))
    for row, unbounded in zip(found, free, strict=True):
        stop = list(unbounded).index(end) + 1 if end in unbounded else 7
        np.testing.assert_array_equal(row[:stop], unbounded[:stop])
        assert (row[stop:] == end).all()
    assert (found[0, 2:] == end).all()


def test_bfloat16_keeps_its_cache_in_bfloat16(model):
    low = cast(model, jnp.bfloat16)
    program = _generate.lower(low, IDS, LEFT, None, None, _Settings(3, None, None, None, None, False))
    assert f"tensor<3x{L + 2}x2x4xbf16>" in program.as_text()
    assert f"tensor<3x{L + 2}x2x4xf32>" not in program.as_text()
    assert generate(low, IDS, LEFT, max_new_tokens=3).shape == (3, 3)


def test_samples_follow_the_distribution(model):
    """The first token of 4,000 equal texts, against the softmax; and the key decides."""
    rows = 4000
    ids, logits = np.repeat(IDS[2:], rows, 0), model({"input_ids": IDS[2:]})["token_logits"][0, -1]
    draw = lambda key: np.asarray(  # noqa: E731
        generate(model, ids, max_new_tokens=1, temperature=2.0, top_k=5, key=jax.random.key(key))
    )[:, 0]
    shares = np.bincount(draw(0), minlength=V) / rows
    expected = np.asarray(jax.nn.softmax(kept(logits[None] / 2, top_k=5)[0]))
    assert (expected > 0).sum() == 5 and not shares[expected == 0].any()
    assert np.abs(shares - expected).max() < 4 * 0.5 / rows**0.5
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize("drawn", [{}, {"temperature": 2.0, "top_k": 5}])
def test_a_stream_is_what_generate_gives(drawn, model):
    """Token by token; it ends when all texts have."""
    options = drawn | ({"key": jax.random.key(3)} if drawn else {})
    whole = np.asarray(generate(model, IDS, LEFT, max_new_tokens=7, **options))
    tokens = stream(model, IDS, LEFT, max_new_tokens=7, **options)
    np.testing.assert_array_equal(np.stack(list(tokens), 1), whole)
    one = np.asarray(generate(model, IDS[:1], LEFT[:1], max_new_tokens=7, **options))[0]
    end = int(one[2])
    few = list(stream(model, IDS[:1], LEFT[:1], max_new_tokens=7, eos_id=end, **options))
    assert [int(token[0]) for token in few] == [*one[: list(one).index(end) + 1]]
    with pytest.raises(ValueError, match="max_new_tokens=0"):  # at once, not at the first token
        stream(model, IDS, max_new_tokens=0)


def test_written_waits_for_whole_characters():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(i for i in ids if i or not skip_special_tokens).decode(errors="replace")

    text = "aé€b".encode()
    steps = [np.array([byte, 99]) for byte in (*text, 0)]
    assert list(stream_text(Bytes(), iter(steps))) == ["a", "é", "€", "b", ""]
    assert list(stream_text(Bytes(), iter(steps[:2]))) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_what_the_filters_keep():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))

    def places(**settings):
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in kept(logits, **settings)]

    assert places(top_k=2) == [[1, 3], [0, 2]] and places(top_k=9) == [[0, 1, 2, 3]] * 2
    # As few as have that much: 0.4 alone has 0.35, and both are needed for 0.45.
    assert places(top_p=0.35) == [[1], [0]] and places(top_p=0.45) == [[1, 3], [0]]
    assert places(top_p=0.8) == [[1, 2, 3], [0, 2]] and places(top_p=1e-6) == [[1], [0]]
    # Of the two kept by top_k, the shares are 4/7 and 3/7, and 14/17 and 3/17.
    assert places(top_k=2, top_p=0.6) == [[1, 3], [0]]


def test_errors(model, key):
    module = Bert(BertConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    bert = linen(module, {"params": {}}).replace(config=module.config)
    with pytest.raises(ValueError, match="needs a causal model .* this model is bert"):
        generate(bert, IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="this model is Linen"):
        generate(bert.replace(config=None), IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, IDS, max_new_tokens=0)
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, IDS, max_new_tokens=1, temperature=1.0)
    with pytest.raises(ValueError, match="0 draws none"):
        generate(model, IDS, max_new_tokens=1, key=key)
    with pytest.raises(ValueError, match="need a temperature above 0"):
        generate(model, IDS, max_new_tokens=1, top_k=3)
    with pytest.raises(ValueError, match="beams search, they draw no tokens"):
        generate(model, IDS, max_new_tokens=1, beams=2, temperature=1.0, key=key)
    with pytest.raises(ValueError, match="without input_ids generate needs encoder="):
        generate(model, None, max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p=1.5"):
        generate(model, IDS, max_new_tokens=1, temperature=1.0, top_p=1.5, key=key)


def test_tokens_of_another_model(model):
    """Of a larger vocabulary, or padding of -100; NaN would come of them. Traced ids cannot be looked at."""
    for token in (V, -100):
        ids = np.where(np.arange(L) == 2, token, IDS)
        with pytest.raises(
            ValueError, match=f"input_ids holds the token {token}, and the model has .* 0 to {V - 1}"
        ):
            generate(model, ids, max_new_tokens=1)
    t5 = ARCHITECTURES["t5"].config(vocab_size=V)
    heard = linen(Bert(BertConfig()), {"params": {}}).replace(config=t5)
    with pytest.raises(ValueError, match=f"input_ids holds the token {V}"):
        generate(heard, None, encoder={"input_ids": np.full((1, 2), V)}, max_new_tokens=1)
    with pytest.raises(ValueError, match=f"decoder_input_ids holds the token {V}"):
        generate(heard, np.full((1, 2), V), encoder={"input_ids": IDS}, max_new_tokens=1)
    traced = jax.jit(lambda ids: generate(model, ids, max_new_tokens=2))(IDS)
    np.testing.assert_array_equal(traced, generate(model, IDS, max_new_tokens=2))


@pytest.mark.parity
@pytest.mark.parametrize("window", [None, 4])
def test_tokens_of_transformers(window, tmp_path):
    """Greedy, padded on the left."""
    import torch
    import transformers

    from jtl import load, save

    config = MistralConfig(**SIZES, sliding_window=window) if window else LlamaConfig(**SIZES)
    config = dataclasses.replace(config, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    folder = save(random_model(config), tmp_path / "tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fields = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(LEFT)}
    expected = theirs.generate(**fields, max_new_tokens=20, do_sample=False)[:, L:].numpy()
    np.testing.assert_array_equal(generate(load(folder), IDS, LEFT, max_new_tokens=20), expected)


@pytest.mark.parity
@pytest.mark.slow
def test_smollm2_writes_what_it_writes_in_transformers(tmp_path):
    """64 tokens of three prompts, padded on the left."""
    import torch
    import transformers

    from jtl import load, pretrained, save

    model, words = load("smollm2"), pretrained.tokenizer("smollm2")
    words.padding_side = "left"
    chat = [{"role": "user", "content": "What is gravity? Answer in two sentences."}]
    texts = ["The capital of France is", words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
             "def fibonacci(n):"]  # fmt: skip
    batch = words(texts, padding=True, return_tensors="np")
    ids, mask = (batch[name].astype(np.int32) for name in ("input_ids", "attention_mask"))
    folder = save(model, tmp_path / "smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fields = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    expected = theirs.generate(
        **fields, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )
    np.testing.assert_array_equal(
        generate(model, ids, mask, max_new_tokens=64), expected[:, ids.shape[1] :].numpy()
    )
