"""Data: embedded, public and your own sets; text and images made ready once; deterministic resumable loaders."""

from jtl.data import (
    annotated,
    audio,
    episodes,
    image,
    loader,
    midi,
    music,
    music_corpus,
    music_tokens,
    pairs,
    shift,
    speech,
    text,
    windows,
)
from jtl.data.coco import load_boxes
from jtl.data.dataset import DataError, Dataset, Source, Subset, labels, subset, subset_indices
from jtl.data.fewshot import load_classes
from jtl.data.masks import load_masks
from jtl.data.mixed import Mixed
from jtl.data.questions import load_questions
from jtl.data.sources import NAMES, load
from jtl.data.spec_augment import spec_augment
from jtl.data.summaries import load_summaries
from jtl.data.utterances import load_utterances

__all__ = [
    "NAMES", "DataError", "Dataset", "Mixed", "Source", "Subset", "annotated", "audio", "episodes", "image",
    "labels", "load", "load_boxes", "load_classes", "load_masks", "load_questions", "load_summaries",
    "load_utterances", "loader", "midi", "music", "music_corpus", "music_tokens", "pairs", "shift", "spec_augment",
    "speech", "subset", "subset_indices", "text", "windows",
]  # fmt: skip
