"""Data: named, public and your own data sets, their encoding for a model, and resumable batches."""

from jtl.data.batches import episodes, loader
from jtl.data.batches.arrays import Arrays
from jtl.data.batches.mixing import SideBySide
from jtl.data.batches.mixup import mixup
from jtl.data.dataset import DataError, Dataset, Source, Subset, labels, subset, subset_indices
from jtl.data.encode import annotated, image, pairs, spectrograms, text, windows
from jtl.data.encode.spec_augment import spec_augment
from jtl.data.load import NAMES, load, load_classes
from jtl.data.readers import midi, sound
from jtl.data.sets import chorales, espeak, shift

__all__ = [
    "NAMES", "Arrays", "DataError", "Dataset", "SideBySide", "Source", "Subset", "annotated", "chorales", "episodes",
    "espeak", "image", "labels", "load", "load_classes", "loader", "midi", "mixup", "pairs", "shift", "sound",
    "spec_augment", "spectrograms", "subset", "subset_indices", "text", "windows",
]  # fmt: skip
