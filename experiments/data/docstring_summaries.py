"""The prose of a docstring with its first line as the summary, which the prose does not hold.

NumPy and SciPy are train, Flax is validation, scikit-learn and Optax are test.
"""

from __future__ import annotations

from experiments.data.docstrings import docstrings, versions
from jtl.data.dataset import Dataset, Example
from jtl.data.readers.summaries import dataset

# No package is in two splits, so that none shares a docstring.
PACKAGES = {"train": ("numpy", "scipy"), "validation": ("flax",), "test": ("sklearn", "optax")}
LEAST_WORDS = 15  # of the prose: a shorter one says no more than the summary
SUMMARY_WORDS = (3, 25)


def docstring_summaries() -> Dataset:
    """Docstrings of installed packages and their first lines, other packages in each split."""
    splits: dict[str, list[Example]] = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = []
        for package in PACKAGES[split]:
            for one in docstrings(package):
                text, words = " ".join(one.prose), len(one.summary.split())
                if len(text.split()) < LEAST_WORDS or text in seen:
                    continue
                if SUMMARY_WORDS[0] <= words <= SUMMARY_WORDS[1]:
                    seen.add(text)
                    splits[split].append({"text": text, "summary": one.summary})
    packages = [package for own in PACKAGES.values() for package in own]
    parts = {split: splits[split] for split in PACKAGES}
    return dataset("docstrings", parts, f"docstrings of {versions(packages)}")
