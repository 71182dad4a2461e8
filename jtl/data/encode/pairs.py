"""Texts and what a language model should write after them, as rows of tokens.

A causal model reads a prompt that holds the text and goes on with the answer, one row. A decoder behind an encoder gets
the text there, and writes the answer itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import DataError, Source
from jtl.data.encode.text import SHAPES, best_buckets


@dataclass(frozen=True, eq=False)
class Pairs:
    """A tokenised split: N texts and answers.

    Attributes:
      prompts: token ids of each prompt.
      answers: token ids of each answer, its end included.
      pad_id: token id that fills short rows.
      start_id: with which a decoder behind an encoder begins; None for a causal model.
    """

    prompts: tuple[Int[np.ndarray, " _"], ...]
    answers: tuple[Int[np.ndarray, " _"], ...]
    pad_id: int
    start_id: int | None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each row, of a causal model with the answer."""
        own = self.prompt_lengths
        return own if self.start_id is not None else own + np.array([len(answer) for answer in self.answers])

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each prompt."""
        return np.array([len(prompt) for prompt in self.prompts])

    @property
    def buckets(self) -> tuple[int, ...]:
        """Default padded lengths."""
        return best_buckets(self.lengths, SHAPES)

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """The fields of training, int32.

        ``input_ids`` and ``attention_mask`` ``(B, length)``. For a causal model also ``continuation``, 1 where a token
        of the answer is predicted (``jtl.tasks.CausalLM(mask="continuation")``); for a decoder ``labels``,
        ``decoder_input_ids`` and ``decoder_attention_mask``, padded to the longest answer (``jtl.tasks.Seq2Seq``).
        """
        prompts, answers = ([part[i] for i in indices] for part in (self.prompts, self.answers))
        if self.start_id is None:
            rows = [np.concatenate(both) for both in zip(prompts, answers, strict=True)]
            ids, mask = self._padded(rows, length)
            column, first = np.arange(length), np.array([[len(prompt) - 1] for prompt in prompts])
            predicts = (column >= first) & (column < mask.sum(1, keepdims=True) - 1)
            return {"input_ids": ids, "attention_mask": mask, "continuation": predicts.astype(np.int32)}
        ids, mask = self._padded(prompts, length)
        target, real = self._padded(answers, max(map(len, self.answers)))
        before = np.full((len(target), 1), self.start_id, np.int32)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": np.where(real == 1, target, -100).astype(np.int32),
            "decoder_input_ids": np.concatenate([before, target[:, :-1]], 1),
            "decoder_attention_mask": np.concatenate([np.ones_like(before), real[:, :-1]], 1),
        }

    def prompt(self, indices: Int[np.ndarray, " B"], length: int) -> dict[str, Int[np.ndarray, "B L"]]:
        """The prompts alone, ``input_ids`` and ``attention_mask``, to be answered."""
        ids, mask = self._padded([self.prompts[i] for i in indices], length)
        return {"input_ids": ids, "attention_mask": mask}

    def _padded(self, rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = (
            np.full((len(rows), length), self.pad_id, np.int32),
            np.zeros((len(rows), length), np.int32),
        )
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        return ids, mask


def encode(
    source: Source,
    tokenizer: Any,
    *,
    prompt: str = "{text}",
    max_text: int = 128,
    max_answer: int = 32,
    start_id: int | None = None,
) -> Pairs:
    """Tokenises every text of a split with its prompt, and the summary behind it, once.

    A text longer than ``max_text`` loses its end, and a summary longer than ``max_answer`` too; the prompt is whole.

    Args:
      source: examples with ``text``, and ``summary`` where there is one.
      tokenizer: a fast tokenizer of ``transformers`` with an ``eos_token``.
      prompt: what the model reads, with the text in the place of ``{text}``.
      max_text: tokens of a text.
      max_answer: tokens of an answer, its end included.
      start_id: ``model.config.decoder_start_token_id`` of a decoder behind an encoder.

    Raises:
      DataError: the split is empty, a text is blank, the prompt has no place for it, or the tokenizer has no end.
    """
    if not len(source):
        raise DataError("cannot tokenise an empty split")
    if prompt.count("{text}") != 1:
        raise DataError(f"the prompt {prompt!r} needs {{text}} once, where the text is to stand")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no end of text, which an answer needs: set eos_token"
        )
    examples = [source[i] for i in range(len(source))]
    if blank := [i for i, one in enumerate(examples) if not one["text"].strip()]:
        raise DataError(f"text {blank[0]} is blank: drop it")

    def ids(texts: list[str], special: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    # The text is cut by its tokens, then the whole prompt is tokenised, so that words at its borders are as ever.
    texts = [one["text"] for one in examples]
    short = [
        text if len(own) <= max_text else tokenizer.decode(own[:max_text])
        for text, own in zip(texts, ids(texts), strict=True)
    ]
    prompts = ids([prompt.replace("{text}", text) for text in short], special=start_id is not None)
    space = "" if start_id is not None or prompt != prompt.rstrip() else " "
    answers = [
        [*own[: max_answer - 1], tokenizer.eos_token_id]
        for own in ids([f"{space}{one.get('summary', '')}" for one in examples])
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [tuple(np.array(row, np.int32) for row in part) for part in (prompts, answers)]
    return Pairs(rows[0], rows[1], int(pad), start_id)
