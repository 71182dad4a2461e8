"""Questions with their contexts encoded for a model; a context too long for one row is split into overlapping windows.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
https://arxiv.org/abs/1810.04805, and its ``run_squad.py``: windows of ``max_length`` tokens, of which neighbours share
``stride``. A window that does not contain the whole answer is labelled with its first token, [CLS].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import DataError, Source
from jtl.data.encode.text import SHAPES, best_buckets


@dataclass(frozen=True, eq=False)
class Windows:
    """A split of M questions, as N windows.

    Attributes:
        tokens: token ids of all windows, including special tokens.
        characters: where each token begins and ends in its context, in characters; 0 outside it.
        starts: where each window begins in ``tokens``, and as last entry the end.
        context: first and last token of the context in each window, counted from the window's start.
        answer: first and last token of the answer likewise; 0, 0 if the window does not contain it.
        example: which question each window belongs to.
        pad_id: token id of padding.
        max_length: of a window, in tokens.
        segments: whether the model distinguishes question and context by ``token_type_ids``.
    """

    tokens: Int[np.ndarray, " T"]
    characters: Int[np.ndarray, "T 2"]
    starts: Int[np.ndarray, " K"]
    context: Int[np.ndarray, "N 2"]
    answer: Int[np.ndarray, "N 2"]
    example: Int[np.ndarray, " N"]
    pad_id: int
    max_length: int
    segments: bool

    def __len__(self) -> int:
        return len(self.example)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each window."""
        return np.diff(self.starts)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Default padded lengths."""
        return best_buckets(self.lengths, SHAPES, self.max_length)

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """Returns inputs and targets, all int32.

        ``input_ids``, ``attention_mask``, ``inside`` (1 at tokens of the context), and ``token_type_ids`` if the model
        has them, are ``(B, length)``; ``start`` and ``end``, first and last token of the answer, are ``(B,)``.
        """
        column = np.arange(length)
        mask = column < self.lengths[indices, None]
        tokens = self.tokens[np.minimum(self.starts[indices, None] + column, len(self.tokens) - 1)]
        first, last = self.context[indices, :1], self.context[indices, 1:]
        fields = {
            "input_ids": np.where(mask, tokens, self.pad_id),
            "attention_mask": mask,
            "inside": (column >= first) & (column <= last),
            "start": self.answer[indices, 0],
            "end": self.answer[indices, 1],
        }
        if self.segments:
            fields["token_type_ids"] = (column >= first) & mask
        return {name: field.astype(np.int32) for name, field in fields.items()}

    def in_context(
        self, windows: Int[np.ndarray, " B"], start: Int[np.ndarray, " B"], end: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, "B 2"]:
        """Converts spans of tokens to characters of their contexts: the first, and one past the last."""
        begin = self.starts[windows]
        return np.stack([self.characters[begin + start, 0], self.characters[begin + end, 1]], 1)


def encode(
    source: Source,
    tokenizer: Any,
    max_length: int = 128,
    stride: int = 32,
    *,
    segments: bool = True,
    vocab_size: int | None = None,
) -> Windows:
    """Tokenises every question of a split with its context.

    Args:
        source: examples of ``jtl.data.load(name, "questions")``; ``answers`` and ``starts`` may be missing if nothing
            is trained. The first answer is the training target.
        tokenizer: a fast tokenizer of ``transformers``.
        max_length: tokens of a window, including the question and special tokens.
        stride: context tokens that neighbouring windows share.
        segments: include ``token_type_ids``, which BERT takes, but RoBERTa and DistilBERT do not.
        vocab_size: the model's vocabulary size; None skips the check.

    Raises:
        DataError: the split is empty, a question leaves no room for its context, a context has no tokens, or a token is
            outside the model's vocabulary.
    """
    if not len(source):
        raise DataError("cannot tokenise an empty split")
    examples = [source[i] for i in range(len(source))]
    special = tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([one["question"] for one in examples], add_special_tokens=False)["input_ids"]
    longest = int(np.argmax([len(ids) for ids in questions]))
    room = max_length - special - len(questions[longest])
    if room <= stride:
        raise DataError(
            f"question {longest} has {len(questions[longest])} tokens, which leave {room} of a window of {max_length} "
            f"for the context, and the stride is {stride}: take a larger max_length, a smaller stride, or shorter "
            "questions"
        )
    encoded = tokenizer(
        [one["question"] for one in examples],
        [one["context"] for one in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    example = np.array(encoded["overflow_to_sample_mapping"], np.int32)
    context, answer, characters = [], [], []
    for window, which in enumerate(example):
        inside = np.array([part == 1 for part in encoded.sequence_ids(window)])
        if not inside.any():
            raise DataError(f"the context of question {which} has no tokens")
        offsets = np.where(inside[:, None], np.array(encoded["offset_mapping"][window]), 0)
        context.append((int(inside.argmax()), int(len(inside) - 1 - inside[::-1].argmax())))
        answer.append(_find(examples[which], offsets, *context[-1]))
        characters.append(offsets)
    rows = encoded["input_ids"]
    tokens = np.array([token for row in rows for token in row], np.int32)
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        raise DataError(
            f"the tokenizer gives the token {int(tokens.max())}, and the model has embeddings of 0 to "
            f"{vocab_size - 1}: take the model's own tokenizer, jtl.pretrained.tokenizer(NAME)"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Windows(
        tokens=tokens,
        characters=np.concatenate(characters).astype(np.int32),
        starts=np.cumsum([0, *map(len, rows)]),
        context=np.array(context, np.int32),
        answer=np.array(answer, np.int32),
        example=example,
        pad_id=int(pad_id or 0),
        max_length=max_length,
        segments=segments,
    )


def _find(example: Any, offsets: Int[np.ndarray, "L 2"], first: int, last: int) -> tuple[int, int]:
    """First and last token of the answer in a window with context ``first`` to ``last``; (0, 0) if it is not there."""
    if not example.get("answers"):
        return 0, 0
    begin = example["starts"][0]
    end = begin + len(example["answers"][0])
    own = offsets[first : last + 1]
    if begin < own[0, 0] or end > own[-1, 1]:
        return 0, 0
    start = int(np.flatnonzero(own[:, 1] > begin)[0])
    stop = int(np.flatnonzero(own[:, 0] < end)[-1])
    return (first + start, first + stop) if start <= stop else (0, 0)
