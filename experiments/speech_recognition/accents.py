"""Sentences spoken by eSpeak NG: exact transcripts, speakers and accents at will, and a machine's voice throughout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex

from experiments.data.docstrings import docstrings
from jtl.data.dataset import Dataset, Example
from jtl.data.readers.speech import dataset
from jtl.data.sets import builders
from jtl.data.sets.espeak import synthesise

ACCENT, ACCENT_SPEED = "en-gb-scotland", 175  # words a minute
# Of each split other speakers.
SPEAKERS: Mapping[str, tuple[str, ...]] = {
    "train": ("m1", "m2", "m3", "m4", "f1", "f2"),
    "validation": ("m5", "f3"),
    "test": ("m6", "m7", "f4", "f5"),
}
PLAIN, PLAIN_SPEED = ("en-us", "en", "en-us+m3", "en-us+f2"), 150
WORDS = (4, 25)  # of a sentence
MOST = {"accented": 80, "english": 55}  # words of a clip, which so lasts up to half a minute


@dataclass(frozen=True)
class Spoken:
    """Texts as sound, made when asked for: text i by voice i, and by the first again after the last.

    Attributes:
        texts: what is said.
        voices: eSpeak's names, as ``"en-us+f2"``.
        speed: words a minute.
    """

    texts: tuple[str, ...]
    voices: tuple[str, ...]
    speed: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        """``audio`` float32 (N,) at 16 kHz, ``text`` and ``voice``."""
        i = range(len(self))[index]
        voice = self.voices[i % len(self.voices)]
        return {
            "audio": synthesise([self.texts[i]], voice, speed=self.speed)[0],
            "text": self.texts[i],
            "voice": voice,
        }


def accented() -> Dataset:
    """Sentences about films in Scottish English: other sentences and other speakers in each split.

    They are those of Rotten Tomatoes (Pang and Lee 2005) without figures or signs, a few of them in a clip: what
    critics wrote, not what people say. The accent is what eSpeak makes of Scotland's.
    """
    films = builders.embedded("rotten_tomatoes")
    found = {}
    for split, speakers in SPEAKERS.items():
        source = films.splits[split]
        texts = together(sentences(source[i]["text"] for i in range(len(source))), MOST["accented"])
        found[split] = Spoken(texts, tuple(f"{ACCENT}+{speaker}" for speaker in speakers), ACCENT_SPEED)
    return dataset("scottish", found, f"eSpeak NG's {ACCENT}, with sentences of Rotten Tomatoes")


def english() -> Spoken:
    """Sentences of another kind in common voices: the first lines of docstrings of scikit-learn, a few in a clip."""
    lines = sentences(one.summary for one in docstrings("sklearn"))
    return Spoken(together(lines, MOST["english"]), PLAIN, PLAIN_SPEED)


def sentences(texts: Iterable[str]) -> list[str]:
    """The texts of 4 to 25 words of letters alone, each once, with a capital and a full stop.

    >>> sentences(["a gripping , chamber thriller", "2 stars", "Yes!"])
    ['A gripping chamber thriller.']
    """
    kept: dict[str, None] = {}
    for text in texts:
        bare = " ".join(re.sub(r"[,.!?;:-]", " ", text).split())
        if re.fullmatch(r"[A-Za-z][a-z ]+", bare) and WORDS[0] <= len(bare.split()) <= WORDS[1]:
            kept[f"{bare[0].upper()}{bare[1:]}."] = None
    return list(kept)


def together(texts: Iterable[str], most: int) -> tuple[str, ...]:
    """The texts one behind the other, as many as have ``most`` words or fewer together.

    >>> together(["One two.", "Three.", "Four five."], most=3)
    ('One two. Three.', 'Four five.')
    """
    clips: list[list[str]] = [[]]
    for text in texts:
        if len(" ".join([*clips[-1], text]).split()) > most:
            clips.append([])
        clips[-1].append(text)
    return tuple(" ".join(clip) for clip in clips if clip)
