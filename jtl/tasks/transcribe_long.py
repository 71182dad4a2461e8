"""Transcripts by Whisper of sounds of any length, window after window.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356,
section 3.8: what is said in half a minute is written with its times, and the next window begins where the last stretch
that was heard to its end ends. As `transcribe` of https://github.com/openai/whisper at temperature 0, without what it
adds against bad transcripts: higher temperatures, thresholds of probability and compression, and the text before as a
prompt. Where nobody speaks, a Whisper may thus write words.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.model import Model
from jtl.tasks.transcribe import TICK, Rules, Segment, Transcript, text_of, tokens

FRAMES = 2  # of a spectrogram, in a tick


def transcribe_long(
    model: Model,
    tokenizer: Any,
    log_mel: Float[np.ndarray | Array, "T M"],
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
    max_new_tokens: int = 224,
) -> Transcript:
    """What is said in one sound of any length, with the times of its segments; one compilation serves all windows.

    >>> sound = jtl.data.encode.spectrograms.log_mel(clip, seconds=None)  # doctest: +SKIP
    >>> transcribe_long(model, tokenizer, sound).segments  # doctest: +SKIP

    Args:
        model: a Whisper.
        tokenizer: its own.
        log_mel: of the whole sound, as ``jtl.data.spectrograms.log_mel(..., seconds=None)`` gives it.
        language: as in ``"en"``; None detects it in the first window.
        task: as for ``transcribe``.
        max_new_tokens: where the transcript of a window is cut.

    Raises:
        ValueError: as ``transcribe`` does.
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
    """The stretches of a window's transcript, and after how many of its ``frames`` the next window begins.

    A stretch is where it starts and ends, in ticks, and its tokens. Two times side by side end one and start another:
    what follows the last of them is left to the next window, unless it is a whole stretch and the last, behind which
    nobody speaks. A transcript without them is one stretch.
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
