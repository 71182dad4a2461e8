"""Speech recognition with Whisper for sounds of any length, window by window.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356,
section 3.8: each 30 s window is transcribed with timestamps, and the next window begins where the last complete segment
ends. It follows ``transcribe`` of https://github.com/openai/whisper at temperature 0, without its safeguards against
bad transcripts: higher temperatures, thresholds on probability and compression, and the previous text as prompt. So
Whisper may write words where nobody speaks.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.model import Model
from jtl.tasks.transcribe import TICK, Rules, Segment, Transcript, text_of, tokens

FRAMES = 2  # spectrogram frames per tick


def transcribe_long(
    model: Model,
    tokenizer: Any,
    log_mel: Float[np.ndarray | Array, "T M"],
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
    max_new_tokens: int = 224,
) -> Transcript:
    """Returns the transcript of one sound of any length, with timed segments; all windows share one compiled program.

    Args:
        model: a Whisper.
        tokenizer: the model's own.
        log_mel: the spectrogram of the whole sound, of ``jtl.data.spectrograms.log_mel(..., seconds=None)``.
        language: as in ``"en"``; None detects it in the first window.
        task: as for ``transcribe``.
        max_new_tokens: where the transcript of a window is cut.

    Raises:
        ValueError: as for ``transcribe``.

    >>> sound = jtl.data.spectrograms.log_mel(clip, seconds=None)  # doctest: +SKIP
    >>> transcribe_long(model, tokenizer, sound).segments  # doctest: +SKIP
    """
    window = 2 * getattr(model.config, "max_source_positions", 1500)
    sound, place = np.asarray(log_mel), 0
    segments: list[Segment] = []
    words: list[int] = []
    while place < len(sound):
        piece = sound[place : place + window]
        padded = np.pad(piece, ((0, window - len(piece)), (0, 0)))
        (row,), (language,), rule = tokens(
            model, tokenizer, jnp.asarray(padded)[None], language, task, True, max_new_tokens
        )
        stretches, heard = cut(row, len(piece), rule)
        for start, end, own in stretches:
            words += own
            if said := text_of(own, tokenizer, rule):
                began = place * TICK / FRAMES
                segments.append(Segment(round(began + start * TICK, 2), round(began + end * TICK, 2), said))
        place += heard
    return Transcript(text_of(words, tokenizer, rule), language or "", tuple(segments))


def cut(row: list[int], frames: int, rule: Rules) -> tuple[list[tuple[int, int, list[int]]], int]:
    """Splits a window's transcript into segments; returns them and how many of its ``frames`` were consumed.

    The next window begins after those frames. A segment is its start and end, in ticks, and its tokens. Two adjacent
    timestamps end one segment and start the next. Text after the last such pair is left to the next window, unless it
    is a complete final segment, after which nobody speaks. A transcript without such a pair is one segment.
    """
    timed = [token >= rule.times for token in row]
    ends = [place for place in range(1, len(row)) if timed[place - 1] and timed[place]]
    whole = len(row) > 1 and timed[-2:] == [False, True]
    if not ends:
        times = [token - rule.times for token in row if token >= rule.times]
        end = times[-1] if times and times[-1] > 0 else frames // FRAMES
        return ([(times[0] if times else 0, end, row)] if row else []), frames
    ends += [len(row)] * whole
    stretches = []
    for start, end in zip([0, *ends], ends, strict=False):
        own = row[start:end]
        stretches.append((own[0] - rule.times, own[-1] - rule.times, own))
    return stretches, frames if whole else min(max(FRAMES * stretches[-1][1], FRAMES), frames)
