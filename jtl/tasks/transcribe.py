"""Transcripts by Whisper: what is said in up to half a minute of sound, greedily, and when.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356,
section 2.3: tokens say the language, the task and whether to write times. The rules for times are those of the paper's
code, `ApplyTimestampRules` of https://github.com/openai/whisper.
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

TICK = 0.02  # seconds between two tokens of time
LATEST_START = 50  # ticks: the first words begin within a second


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: ``text``, from ``start`` to ``end`` in seconds; None where the transcript was cut."""

    start: float
    end: float | None
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said: the whole ``text``, its ``language``, and ``segments`` if times were asked for."""

    text: str
    language: str
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Which tokens may come next: a ``rule`` of ``generate``.

    Attributes:
        suppress: never.
        begin_suppress: not at the start.
        end: the token that ends a text; text tokens are below it.
        times: the first token of time, one behind that which forbids them.
        timed: whether each segment begins and ends with a token of time.
    """

    suppress: tuple[int, ...]
    begin_suppress: tuple[int, ...]
    end: int
    times: int
    timed: bool

    def __call__(
        self, logits: Float[Array, "B V"], new: Int[Array, "B N"], i: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """Minus infinity at what may not come after the first i of ``new``."""
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
        # A time after text may be followed by the same time alone; all others come later than the latest.
        soonest = jnp.where(ended & ~paired, latest, latest + 1)
        forbidden = (
            (ids == self.times - 1)
            | (ended & paired & is_time)
            | (ended & ~paired & (ids < self.end))
            | (is_time & (ids < soonest))
            | ((i == 0) & (~is_time | (ids > self.times + LATEST_START)))
        )
        logits = jnp.where(forbidden, -jnp.inf, logits)
        # If a time is likelier than the likeliest word, it is a time.
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
    """What is said in each of B sounds, by the likeliest token at each step.

    >>> sounds = np.stack([jtl.data.spectrograms.log_mel(clip) for clip in clips])  # doctest: +SKIP
    >>> transcribe(jtl.load("whisper-base"), jtl.pretrained.tokenizer("whisper-base"), sounds)  # doctest: +SKIP

    Args:
        model: a Whisper.
        tokenizer: its own.
        log_mel: as ``jtl.data.spectrograms.log_mel`` gives them, of 30 s; longer sounds are for ``transcribe_long``.
        language: as in ``"en"``; None detects it for each sound.
        task: ``"translate"`` writes English whatever is spoken.
        timestamps: whether to write ``segments``.
        max_new_tokens: where a transcript is cut; each number is a compilation.

    Raises:
        ValueError: a model that is no Whisper, the tokenizer of a larger one, an unknown language, a task that a model
            of English alone does not know, or more tokens than the model has positions.
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
    """What ``transcribe`` writes, as tokens without those that begin and end; the languages; and the rules."""
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
    """The language of each sound that a multilingual Whisper finds most likely. Raises ValueError for other models."""
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
    """The tokens of languages, by name: they stand between those of the start and of translation."""
    first, last = vocabulary["<|startoftranscript|>"], vocabulary["<|translate|>"]
    return {name[2:-2]: token for name, token in vocabulary.items() if first < token < last}


def text_of(tokens: list[int], tokenizer: Any, rule: Rules) -> str:
    """The text of tokens, without those of time."""
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
