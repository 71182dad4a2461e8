"""Texts and target texts encoded for fine-tuning language models, for example to summarise.

A causal model reads a prompt that contains the text and continues with the answer, in one row. An encoder-decoder reads
the prompt in its encoder and writes the answer with its decoder.
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
    """A tokenised split of N prompts and answers.

    Attributes:
        prompts: token ids of each prompt.
        answers: token ids of each answer, including its end token.
        pad_id: token id of padding.
        start_id: the first decoder token of an encoder-decoder; None for a causal model.
    """

    prompts: tuple[Int[np.ndarray, " _"], ...]
    answers: tuple[Int[np.ndarray, " _"], ...]
    pad_id: int
    start_id: int | None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each row; for a causal model, including the answer."""
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
        """Returns the fields for training, int32.

        These are ``input_ids`` and ``attention_mask`` ``(B, length)``. A causal model also gets ``continuation``, 1
        where an answer token is predicted (``jtl.tasks.CausalLM(mask="continuation")``). An encoder-decoder gets
        ``labels``, ``decoder_input_ids`` and ``decoder_attention_mask``, padded to the longest answer
        (``jtl.tasks.Seq2Seq``).
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
        """Returns ``input_ids`` and ``attention_mask`` of the prompts alone, to generate answers from."""
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
    """Tokenises every text of a split with its prompt, followed by its summary.

    Texts longer than ``max_text`` and summaries longer than ``max_answer`` are truncated; the prompt is not.

    Args:
        source: examples with ``text``, and ``summary`` if there is one.
        tokenizer: a fast tokenizer of ``transformers`` with an ``eos_token``.
        prompt: the prompt, with ``{text}`` in place of the text.
        max_text: maximum tokens of a text.
        max_answer: maximum tokens of an answer, including its end token.
        start_id: ``model.config.decoder_start_token_id`` of an encoder-decoder; None for a causal model.

    Raises:
        DataError: the split is empty, a text is blank, the prompt does not contain ``{text}`` once, or the tokenizer
            has no ``eos_token``.
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

    # Truncate the text by its tokens, then tokenise the whole prompt, so that its borders are tokenised as usual.
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
