"""Labelled texts encoded for a model: tokenised once, batched at a few static lengths."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jtl.data.dataset import DataError, Source

SHAPES = 4  # each padded length compiles anew, which costs about ten updates


@dataclass(frozen=True, eq=False)
class Texts:
    """A tokenised split, held as one array of tokens.

    Attributes:
        tokens: token ids of all texts, including special tokens.
        starts: where each text begins in ``tokens``, and as last entry the end.
        labels: label of each text.
        pad_id: token id of padding.
        max_length: maximum length of a text in tokens; the tokenizer truncated longer ones and kept special tokens.
        cut: which texts were truncated.
    """

    tokens: Int[np.ndarray, " T"]
    starts: Int[np.ndarray, " M"]
    labels: Int[np.ndarray, " N"]
    pad_id: int
    max_length: int
    cut: Bool[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def truncated(self) -> int:
        """Number of truncated texts."""
        return int(self.cut.sum())

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each text."""
        return np.diff(self.starts)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Default padded lengths, those that waste the least padding; see ``best_buckets``."""
        return best_buckets(self.lengths, SHAPES, self.max_length)

    @property
    def fingerprint(self) -> str:
        """Hash of the content, for caches of what is computed from it."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def take(self, indices: Int[np.ndarray, " M"]) -> Texts:
        """Returns the texts at ``indices``, in that order."""
        rows = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in indices]
        starts = np.cumsum([0, *(len(row) for row in rows)])
        return replace(
            self,
            tokens=np.concatenate(rows),
            starts=starts,
            labels=self.labels[indices],
            cut=self.cut[indices],
        )

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """Returns ``input_ids`` and ``attention_mask`` ``(B, length)``, ``label`` ``(B,)``, all int32."""
        starts, lengths = self.starts[indices, None], self.lengths[indices, None]
        column = np.arange(length)
        mask = column < lengths
        tokens = self.tokens[np.minimum(starts + column, len(self.tokens) - 1)]
        return {
            "input_ids": np.where(mask, tokens, self.pad_id).astype(np.int32),
            "attention_mask": mask.astype(np.int32),
            "label": self.labels[indices].astype(np.int32),
        }


def best_buckets(lengths: Int[np.ndarray, " N"], count: int, most: int | None = None) -> tuple[int, ...]:
    """Returns at most ``count`` padded lengths, multiples of 8, that minimise the padding of texts of these lengths.

    The last fits the longest text and is at most ``most``, unless the longest text exceeds it.

    >>> best_buckets(np.array([5, 6, 7, 30, 31, 60]), 2)
    (8, 64)
    """
    longest = int(np.max(lengths))
    top = min(-(-longest // 8) * 8, max(most or longest + 8, longest))
    ends = np.array([*range(8, top, 8), top])
    below = np.searchsorted(np.sort(lengths), ends, side="right")  # number of texts that fit each length
    # cost[j]: the fewest padded tokens of the texts that fit ends[j]; chosen[j]: the lengths that reach it.
    cost = ends * below
    chosen: list[tuple[int, ...]] = [(int(end),) for end in ends]
    for _ in range(count - 1):
        better, longer = cost.copy(), list(chosen)
        for j in range(len(ends)):
            split = cost[:j] + ends[j] * (below[j] - below[:j])
            if j and split.min() < better[j]:
                better[j], longer[j] = split.min(), (*chosen[int(split.argmin())], int(ends[j]))
        cost, chosen = better, longer
    return chosen[-1]


def encode(source: Source, tokenizer: Any, max_length: int = 128, *, vocab_size: int | None = None) -> Texts:
    """Tokenises every text of a split.

    Args:
        source: examples with ``text`` and ``label``.
        tokenizer: a fast tokenizer of ``transformers``.
        max_length: maximum row length in tokens, including special tokens; longer texts lose their end.
        vocab_size: the model's vocabulary size, ``model.config.vocab_size``; None skips the check.

    Raises:
        DataError: the split is empty, the tokenizer has no padding token, a text has no tokens, or a token is outside
            the model's vocabulary, where its embedding would be NaN.
    """
    if not len(source):
        raise DataError("cannot tokenise an empty split")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")
    examples = [source[i] for i in range(len(source))]
    encoded = tokenizer(
        [example["text"] for example in examples],
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    rows = encoded["input_ids"]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if not lengths.all():
        raise DataError(f"example {int(np.argmin(lengths))} has no tokens: its text is blank; drop it")
    tokens = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
    if vocab_size is not None and (most := max(int(tokens.max()), int(pad_id))) >= vocab_size:
        raise DataError(
            f"the tokenizer gives the token {most} ({tokenizer.convert_ids_to_tokens(most)!r}), and the model has "
            f"embeddings of 0 to {vocab_size - 1}: take the model's own tokenizer, jtl.pretrained.tokenizer(NAME)"
        )
    cut = [bool(one.overflowing) for one in encoded.encodings or ()] or [False] * len(rows)
    return Texts(
        tokens=tokens,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.fromiter((example["label"] for example in examples), np.int32, len(examples)),
        pad_id=int(pad_id),
        max_length=max_length,
        cut=np.array(cut),
    )
