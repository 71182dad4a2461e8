"""Transcripts: the rules on a small vocabulary, the loop on a small Whisper, and Whisper base on synthesised speech."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from experiments.models.check import SENTENCES, plain
from jtl import adapters, tree
from jtl.data.encode import spectrograms
from jtl.data.readers.sound import RATE
from jtl.data.sets import espeak
from jtl.model import cast, linen
from jtl.models.whisper import Whisper
from jtl.models.whisper_config import WhisperConfig
from jtl.tasks import detect_language, generate, transcribe, transcribe_long, word_error_rate
from jtl.tasks.transcribe import Rules, Segment, _transcript
from jtl.wrap import function

SIZES = dict(vocab_size=19, num_mel_bins=3, d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=9,
             decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=9, max_source_positions=5,
             max_target_positions=12, init_std=0.8)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    config = WhisperConfig(**SIZES)
    sounds = np.random.default_rng(0).normal(size=(3, 10, 3)).astype(np.float32)
    variables = jax.jit(Whisper(config).init)(jax.random.key(0), sounds, np.zeros((3, 1), np.int32))
    return linen(Whisper(config), variables).replace(config=config), sounds


def no_even(logits, new, i):
    """No even token at first, no token twice."""
    seen = jax.nn.one_hot(new, logits.shape[-1]).astype(bool) & (jnp.arange(new.shape[1]) < i)[None, :, None]
    even = (jnp.arange(logits.shape[-1]) % 2 == 0)[None] & (i == 0)
    return jnp.where(seen.any(1) | even, -jnp.inf, logits)


@pytest.mark.parametrize("begin", [1, 3])
@pytest.mark.parametrize("rule", [None, no_even])
def test_the_loop_gives_what_whole_forwards_give(small, begin, rule):
    model, sounds = small
    ids = np.random.default_rng(1).integers(0, 19, (3, begin)).astype(np.int32)
    found = generate(model, ids, max_new_tokens=6, encoder={"log_mel": sounds}, rule=rule)
    forward = jax.jit(lambda ids: model({"log_mel": sounds, "decoder_input_ids": ids})["token_logits"])
    text = np.zeros((3, begin + 6), np.int32)  # what stands behind a token changes nothing
    text[:, :begin] = ids
    for i in range(6):
        logits = forward(text)[:, begin + i - 1]
        if rule is not None:
            logits = rule(logits, jnp.asarray(text[:, begin:]), i)
        text[:, begin + i] = np.argmax(logits, -1)
    np.testing.assert_array_equal(found, text[:, begin:])
    assert len(np.unique(found)) > (1 if rule is None else 4)


@pytest.mark.slow
def test_adapters_and_bfloat16_write_too(small, key):
    """In the cached steps the keys and values of what was heard are not computed again, nor their adapters."""
    model, sounds = small
    ids = np.full((3, 2), 7, np.int32)
    adapted = adapters.lora(model, rank=2, where=".*attention/(key|value|query)", key=key)
    leaves = tree.flatten(adapted.params)
    moved = {path: leaf + 0.2 * ("/lora/" in path) for path, leaf in leaves.items()}
    adapted = adapted.with_params(tree.nest(moved))
    found, expected, before = (
        generate(m, ids, max_new_tokens=6, encoder={"log_mel": sounds})
        for m in (adapted, adapters.merge(adapted), model)
    )
    np.testing.assert_array_equal(found, expected)
    assert (found != before).any()
    low = cast(model, jnp.bfloat16)
    assert generate(low, ids, max_new_tokens=6, encoder={"log_mel": sounds}).shape == (3, 6)


RULES = Rules(
    suppress=(2,), begin_suppress=(3,), end=6, times=10, timed=True
)  # 0 to 5 are words, 9 says no times
VOCABULARY = 80


def allowed(tokens, rules=RULES, likely=0):
    """What may come after these tokens; `likely` is the likeliest of all."""
    logits = jnp.zeros((1, VOCABULARY)).at[0, likely].set(20.0)
    new = jnp.zeros((1, 8), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens, jnp.int32))
    return np.flatnonzero(np.isfinite(np.asarray(rules(logits, new, jnp.int32(len(tokens))))[0])).tolist()


def test_rules_without_times():
    rules = dataclasses.replace(RULES, timed=False)
    assert allowed([], rules) == [i for i in range(VOCABULARY) if i not in (2, 3)]
    assert allowed([1], rules) == [i for i in range(VOCABULARY) if i != 2]


def test_rules_of_times():
    words, others = [0, 1, 3, 4, 5], [6, 7, 8]
    assert allowed([]) == list(range(10, 61))  # the first is a time within a second
    assert allowed([12]) == words + others  # then come words,
    assert allowed([12, 1]) == words + others + list(range(13, VOCABULARY))  # or a time that is later,
    # after which that again, a later one, or the end,
    assert allowed([12, 1, 15], likely=6) == others + list(range(15, VOCABULARY))
    assert allowed([12, 1, 15, 15]) == words + others  # and words.
    assert allowed([12, 1, 15, 15, 4]) == words + others + list(range(16, VOCABULARY))
    # Times together are likelier than any one word.
    assert allowed([12, 1], likely=70) == list(range(13, VOCABULARY))


def test_segments():
    class Words:
        def decode(self, tokens):
            return "".join(f" {token}" for token in tokens)

    timed = _transcript([10, 1, 4, 60, 70, 5, 6, 80], "en", Words(), RULES)
    assert timed.segments == (Segment(0.0, 1.0, "1 4"), Segment(1.2, 1.4, "5"))
    assert timed.text == "1 4 5"
    assert _transcript([10, 1], "en", Words(), RULES).segments == (Segment(0.0, None, "1"),)
    assert _transcript([1, 4], "en", Words(), RULES).segments == ()


def wer(texts):
    """Word error rate against SENTENCES; case and points do not count."""
    return word_error_rate(plain(SENTENCES), plain(texts))


@pytest.fixture(scope="module")
def whisper():
    return jtl.load("whisper-base"), jtl.pretrained.tokenizer("whisper-base")


def sounds_of(sentences, voice, **settings):
    return np.stack([spectrograms.log_mel(clip) for clip in espeak.synthesise(sentences, voice, **settings)])


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["en", "en-us+m3"])
def test_english_is_understood(whisper, voice):
    found = transcribe(*whisper, sounds_of(SENTENCES, voice), language="en", max_new_tokens=40)
    assert wer([transcript.text for transcript in found]) < 0.1
    assert wer(SENTENCES) == 0 and wer(SENTENCES[::-1]) > 0.5


@pytest.mark.slow
def test_when_it_is_said(whisper):
    """Two sentences with a pause of two seconds: times within half a second, in order; and the language is heard."""
    one, two = espeak.synthesise(SENTENCES[1:3], "en-us+f2")
    clip = np.concatenate([one, np.zeros(2 * RATE, np.float32), two])
    (found,) = transcribe(*whisper, spectrograms.log_mel(clip)[None], timestamps=True, max_new_tokens=40)
    assert found.language == "en" and len(found.segments) >= 2
    first, last = found.segments[0], found.segments[-1]
    assert abs(first.start) < 0.5 and first.text.startswith("She opened") and last.text.endswith("morning.")
    assert abs(last.end - len(clip) / RATE) < 0.5
    times = [time for segment in found.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)


@pytest.mark.slow
def test_languages(whisper):
    texts = {
        "de": "Heute scheint die Sonne und wir gehen in den Garten.",
        "fr": "Je voudrais une tasse de café.",
    }
    sounds = np.concatenate([sounds_of([text], voice) for voice, text in texts.items()])
    assert detect_language(*whisper, sounds) == ["de", "fr"]
    with pytest.raises(ValueError, match="language 'english' is unknown; did you mean"):
        transcribe(*whisper, sounds, language="english")
    with pytest.raises(ValueError, match="max_new_tokens=446 behind 4 tokens are 450; the model has 448"):
        transcribe(*whisper, sounds, language="de", max_new_tokens=446)


def test_the_tokenizer_of_a_larger_whisper(small):
    class Larger:
        def get_vocab(self):
            return {"<|notimestamps|>": 5, "<|more|>": 19}

    model, sounds = small
    with pytest.raises(
        ValueError, match="the tokenizer holds the token 19, and the model has embeddings of 0 to 18"
    ):
        transcribe(model, Larger(), sounds)


def test_models_that_are_no_whisper():
    model = function(lambda params, log_mel: log_mel, {"w": np.ones(1)})
    with pytest.raises(ValueError, match="needs a Whisper; this model is Function"):
        transcribe(model, None, np.zeros((1, 2, 80), np.float32))


@pytest.mark.parity
@pytest.mark.parametrize("size", [51864, 51865, 51866])
def test_transformers_generates_by_what_is_saved(size, tmp_path):
    """Random models with the vocabularies of English alone, of version 2 and of version 3; with times, and without."""
    import torch
    from transformers import WhisperForConditionalGeneration

    end = 50257 - (size == 51864)
    config = WhisperConfig(**SIZES | {"vocab_size": size, "max_source_positions": 1500, "max_target_positions": 20},
                           decoder_start_token_id=end + 1, eos_token_id=end, bos_token_id=end, pad_token_id=end,
                           suppress_tokens=(1, 2, 50000), begin_suppress_tokens=(220, end))  # fmt: skip
    sounds = np.random.default_rng(0).normal(size=(2, 3000, 3)).astype(np.float32)
    variables = jax.jit(Whisper(config).init)(jax.random.key(0), sounds, np.zeros((2, 1), np.int32))
    model = linen(Whisper(config), variables).replace(config=config)
    theirs = WhisperForConditionalGeneration.from_pretrained(
        jtl.pretrained.save(model, tmp_path / "saved")
    ).eval()
    at = config.generation()
    names = {"<|notimestamps|>": at["no_timestamps_token_id"], "<|startoftranscript|>": end + 1}
    names |= at.get("lang_to_id", {}) | {
        f"<|{name}|>": token for name, token in at.get("task_to_id", {}).items()
    }

    class Words:
        def get_vocab(self):
            return names

        def decode(self, tokens):
            return " ".join(map(str, tokens))

    chosen = {} if size == 51864 else {"language": "fr", "task": "translate"}
    for timestamps in (False, True):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor(sounds).transpose(1, 2),
                return_timestamps=timestamps,
                max_new_tokens=12,
                **chosen,
            )
        expected = [" ".join(str(int(token)) for token in row if token < end) for row in out]
        if timestamps:  # it then goes on from window to window
            found = [transcribe_long(model, Words(), sound, max_new_tokens=12, **chosen) for sound in sounds]
        else:
            found = transcribe(model, Words(), sounds, max_new_tokens=12, **chosen)
        assert [transcript.text for transcript in found] == expected
        assert all(expected) and len(" ".join(expected).split()) > 8


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("timestamps", [False, True])
def test_transformers_writes_the_same(whisper, timestamps, tmp_path):
    import torch
    from transformers import WhisperForConditionalGeneration

    model, words = whisper
    vocabulary = words.get_vocab()
    folder = jtl.pretrained.save(model, tmp_path / "saved")  # with its generation_config.json
    theirs = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    sounds = sounds_of(SENTENCES[:3], "en-us")
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(sounds).transpose(1, 2), language="en", task="transcribe", return_timestamps=timestamps,
            max_new_tokens=40,
        )  # fmt: skip
    expected = words.batch_decode(out, skip_special_tokens=True)
    found = transcribe(model, words, sounds, language="en", timestamps=timestamps, max_new_tokens=40)
    assert [transcript.text for transcript in found] == [text.strip() for text in expected]
    if timestamps:
        first = vocabulary["<|notimestamps|>"] + 1
        times = [[round((int(t) - first) * 0.02, 2) for t in row if t >= first] for row in out]
        ours = [[time for s in transcript.segments for time in (s.start, s.end)] for transcript in found]
        assert ours == times
