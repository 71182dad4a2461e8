"""Speech recognition with Whisper: transcripts of sounds of up to 30 s by greedy decoding, optionally with timestamps.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356,
section 2.3: special tokens set the language, the task and whether to write timestamps. The timestamp rules are those of
the paper's code, ``ApplyTimestampRules`` of https://github.com/openai/whisper.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import tree
from jtl.errors import InputError
from jtl.model import Model
from jtl.tasks.decode import check_ids
from jtl.tasks.generate import generate

TICK = 0.02  # seconds between two timestamp tokens
LATEST_START = 50  # ticks: the first segment begins within a second


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: ``text``, from ``start`` to ``end`` in seconds; ``end`` is None if it was cut off."""

    start: float
    end: float | None
    text: str


@dataclass(frozen=True)
class Transcript:
    """A transcript: the whole ``text``, its ``language``, and ``segments`` if timestamps were requested."""

    text: str
    language: str
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Which tokens may come next, as a ``rule`` of ``generate``.

    Attributes:
        suppress: tokens that never occur.
        begin_suppress: tokens that do not occur first.
        end: the token that ends a text; text tokens have smaller ids.
        times: the first timestamp token, which follows the no-timestamps token.
        timed: whether each segment begins and ends with a timestamp token.
    """

    suppress: tuple[int, ...]
    begin_suppress: tuple[int, ...]
    end: int
    times: int
    timed: bool

    def __call__(
        self, logits: Float[Array, "B V"], new: Int[Array, "B N"], i: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """Returns the logits with minus infinity at tokens that may not follow the first i of ``new``."""
        ids = jnp.arange(logits.shape[-1])
        never = jnp.isin(ids, jnp.array(self.suppress, int)) | (
            (i == 0) & jnp.isin(ids, jnp.array(self.begin_suppress, int))
        )
        logits = jnp.where(never[None], -jnp.inf, logits)
        return self._timed(logits, new, i, ids[None]) if self.timed else logits

    def _timed(self, logits: Array, new: Array, i: Array, ids: Int[Array, "1 V"]) -> Array:
        is_time, done = ids >= self.times, jnp.arange(new.shape[1])[None] < i
        last = jnp.take_along_axis(new, jnp.full((len(new), 1), jnp.maximum(i - 1, 0)), 1)
        before = jnp.take_along_axis(new, jnp.full((len(new), 1), jnp.maximum(i - 2, 0)), 1)
        ended, paired = (i > 0) & (last >= self.times), (i < 2) | (before >= self.times)
        latest = jnp.max(jnp.where(done & (new >= self.times), new, self.times - 1), 1, keepdims=True)
        # A timestamp that ends a segment may be followed by an equal one; all others must exceed the latest.
        soonest = jnp.where(ended & ~paired, latest, latest + 1)
        forbidden = (
            (ids == self.times - 1)
            | (ended & paired & is_time)
            | (ended & ~paired & (ids < self.end))
            | (is_time & (ids < soonest))
            | ((i == 0) & (~is_time | (ids > self.times + LATEST_START)))
        )
        logits = jnp.where(forbidden, -jnp.inf, logits)
        # If all timestamps together are more probable than the most probable text token, write a timestamp.
        time = jax.nn.logsumexp(jnp.where(is_time, logits, -jnp.inf), 1, keepdims=True)
        word = jnp.max(jnp.where(is_time, -jnp.inf, logits), 1, keepdims=True)
        return jnp.where((time > word) & ~is_time, -jnp.inf, logits)


def transcribe(
    model: Model,
    tokenizer: Any,
    log_mel: Float[np.ndarray | Array, "B T M"],
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
    timestamps: bool = False,
    max_new_tokens: int = 224,
) -> list[Transcript]:
    """Returns the transcript of each of B sounds, by greedy decoding.

    Args:
        model: a Whisper.
        tokenizer: the model's own.
        log_mel: spectrograms of ``jtl.data.spectrograms.log_mel``, of 30 s; see ``transcribe_long`` for longer sounds.
        language: as in ``"en"``; None detects it for each sound.
        task: ``"translate"`` writes English whatever the spoken language.
        timestamps: whether to return ``segments``.
        max_new_tokens: where a transcript is cut; each value compiles anew.

    Raises:
        ValueError: the model is not a Whisper, the tokenizer is of a larger model, the language is unknown, an
            English-only model is asked for another language or task, or the tokens exceed the model's positions.

    >>> sounds = np.stack([jtl.data.spectrograms.log_mel(clip) for clip in clips])  # doctest: +SKIP
    >>> transcribe(jtl.load("whisper-base"), jtl.pretrained.tokenizer("whisper-base"), sounds)  # doctest: +SKIP
    """
    rows, spoken, rule = tokens(model, tokenizer, log_mel, language, task, timestamps, max_new_tokens)
    return [_transcript(row, name, tokenizer, rule) for row, name in zip(rows, spoken, strict=True)]


def tokens(
    model: Model,
    tokenizer: Any,
    log_mel: Float[np.ndarray | Array, "B T M"],
    language: str | None,
    task: str,
    timestamps: bool,
    max_new_tokens: int,
) -> tuple[list[list[int]], list[str], Rules]:
    """Returns the transcripts of ``transcribe`` as tokens without prompt and end; the languages; and the rules."""
    config, vocabulary = _config(model), tokenizer.get_vocab()
    check_ids(max(vocabulary.values()), config, "the tokenizer")
    silent = vocabulary["<|notimestamps|>"]
    if config.multilingual:
        languages = _languages(vocabulary)
        if language is None:
            spoken = detect_language(model, tokenizer, log_mel)
        elif language in languages:
            spoken = [language] * len(log_mel)
        else:
            near = tree.near_misses(language, languages) or sorted(languages)
            raise InputError(f"language {language!r} is unknown; did you mean {', '.join(near)}?")
        prompts = [
            [config.decoder_start_token_id, languages[name], vocabulary[f"<|{task}|>"]] for name in spoken
        ]
    else:
        if language not in ("en", None) or task != "transcribe":
            raise InputError(
                f"this Whisper transcribes English alone, got language={language!r}, task={task!r}"
            )
        spoken, prompts = ["en"] * len(log_mel), [[config.decoder_start_token_id]] * len(log_mel)
    if not timestamps:
        prompts = [[*prompt, silent] for prompt in prompts]
    if (longest := len(prompts[0]) + max_new_tokens) > config.max_target_positions:
        raise InputError(
            f"max_new_tokens={max_new_tokens} behind {len(prompts[0])} tokens are {longest}; the model has "
            f"{config.max_target_positions} positions"
        )
    rule = Rules(
        config.suppress_tokens or (),
        config.begin_suppress_tokens or (),
        config.eos_token_id,
        silent + 1,
        timestamps,
    )
    new = generate(
        model,
        np.array(prompts, np.int32),
        max_new_tokens=max_new_tokens,
        eos_id=config.eos_token_id,
        encoder={"log_mel": log_mel},
        rule=rule,
    )
    rows = [[int(token) for token in row if token != config.eos_token_id] for row in np.asarray(new)]
    return rows, spoken, rule


def detect_language(model: Model, tokenizer: Any, log_mel: Float[np.ndarray | Array, "B T M"]) -> list[str]:
    """Returns the most probable language of each sound by a multilingual Whisper.

    Raises:
        ValueError: the model is not a multilingual Whisper.
    """
    config, languages = _config(model), _languages(tokenizer.get_vocab())
    if not config.multilingual:
        raise InputError("this Whisper knows English alone")
    start = np.full((len(log_mel), 1), config.decoder_start_token_id, np.int32)
    logits = _first(model, jnp.asarray(log_mel), start)[:, jnp.array(list(languages.values()))]
    return [list(languages)[best] for best in np.asarray(jnp.argmax(logits, 1))]


@jax.jit
def _first(model: Model, log_mel: Array, ids: Array) -> Float[Array, "B V"]:
    return model({"log_mel": log_mel, "decoder_input_ids": ids})["token_logits"][:, 0]


def _config(model: Model) -> Any:
    kind = getattr(model.config, "model_type", type(model.base).__name__)
    if kind != "whisper":
        raise InputError(f"transcribe needs a Whisper; this model is {kind}")
    return model.config


def _languages(vocabulary: dict[str, int]) -> dict[str, int]:
    """Language tokens by name; their ids lie between those of start and translation."""
    first, last = vocabulary["<|startoftranscript|>"], vocabulary["<|translate|>"]
    return {name[2:-2]: token for name, token in vocabulary.items() if first < token < last}


def text_of(tokens: list[int], tokenizer: Any, rule: Rules) -> str:
    """Returns the text of ``tokens``, without timestamps."""
    return tokenizer.decode([token for token in tokens if token < rule.end]).strip()


def _transcript(tokens: list[int], language: str, tokenizer: Any, rule: Rules) -> Transcript:
    places = [place for place, token in enumerate(tokens) if token >= rule.times]
    segments: list[Segment] = []
    for at, following in pairwise([*places, None]):
        if said := text_of(tokens[at:following], tokenizer, rule):
            seconds = [
                None if p is None else round((tokens[p] - rule.times) * TICK, 2) for p in (at, following)
            ]
            segments.append(Segment(seconds[0], seconds[1], said))  # type: ignore[arg-type]
    return Transcript(text_of(tokens, tokenizer, rule), language, tuple(segments))
