"""Base class of the embedded data sets, as TensorFlow Datasets builders."""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow_datasets as tfds


class Embedded(tfds.core.GeneratorBasedBuilder):
    """A builder whose examples come from ``rows()``."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    SKIP_REGISTERING = True  # tfds has a rotten_tomatoes of its own; ``tfds:NAME`` must mean theirs
    ORIGIN: str
    LICENCE: str
    CLASSES: tuple[str, ...]
    FEATURES: dict

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = {**self.FEATURES, "label": tfds.features.ClassLabel(names=list(self.CLASSES))}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("text" if "text" in features else "image", "label"),
            license=self.LICENCE,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.rows().items()}

    def _generate_examples(self, rows: list[dict]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(rows)
