"""Tokenising with a real tokenizer."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import jtl.data as data
from jtl.data.encode.text import best_buckets, encode

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "good", "film", "bad"]


@pytest.fixture
def tokenizer():
    """A word-level fast tokenizer with BERT's special tokens."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def source(*texts):
    return [{"text": text, "label": i} for i, text in enumerate(texts)]


def test_encode(tokenizer):
    texts = encode(source("a good film", "bad", "a good good good film"), tokenizer, max_length=6)
    assert texts.lengths.tolist() == [5, 3, 6] and texts.truncated == 1
    assert [texts.take(np.array([i])).truncated for i in range(3)] == [0, 0, 1]
    assert texts.buckets == (6,)
    batch = texts.batch(np.array([1, 2]), 6)
    assert batch["input_ids"].tolist() == [
        [1, 7, 2, 0, 0, 0],
        [1, 4, 5, 5, 5, 2],
    ]  # cut, and still closed by [SEP]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["label"].tolist() == [1, 2]


def test_buckets_round_up(tokenizer):
    texts = encode(source("a " * 30, "bad"), tokenizer, max_length=128)
    assert texts.buckets == (8, 32)
    texts = encode(source("a " * 33, "bad"), tokenizer, max_length=128)
    assert texts.buckets == (8, 40)


@pytest.mark.parametrize("seed", range(20))
def test_best_buckets_waste_least(seed):
    rng = np.random.default_rng(seed)
    lengths, count = rng.integers(1, 60, 20), int(rng.integers(1, 5))
    top = -(-lengths.max() // 8) * 8

    def padded(buckets):
        return np.array(buckets)[np.searchsorted(buckets, lengths)].sum()

    choices = [(*few, top) for r in range(count) for few in itertools.combinations(range(8, top, 8), r)]
    found = best_buckets(lengths, count)
    assert padded(found) == min(map(padded, choices)) and len(found) <= count and found[-1] == top


def test_errors(tokenizer):
    with pytest.raises(data.DataError, match="empty split"):
        encode([], tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(data.DataError, match="no padding token"):
        encode(source("a"), tokenizer)
    tokenizer.pad_token = "[PAD]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(data.DataError, match="example 1 has no tokens"):
        encode(source("a", " "), tokenizer)


def test_a_tokenizer_of_another_model(tokenizer):
    texts = source("a b", "b c")
    most = max(max(tokenizer(text)["input_ids"]) for text in ("a b", "b c"))
    assert len(encode(texts, tokenizer, vocab_size=most + 1)) == 2
    with pytest.raises(
        data.DataError, match=rf"gives the token {most} \('.*'\), .* embeddings of 0 to {most - 1}: take"
    ):
        encode(texts, tokenizer, vocab_size=most)
