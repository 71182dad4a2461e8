"""Glyphs: printed characters of many scripts with random distortions and whole alphabets held out, a small Omniglot.

A TensorFlow Datasets builder, see ``jtl.data.sets.builders``. Its splits hold different classes, for few-shot learning:
load it by ``jtl.data.load_classes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, UInt8

from jtl.data.dataset import stable_hash
from jtl.data.sets.digits import encode_png, font_folder
from jtl.data.sets.embedded import Embedded

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
COPIES = 20  # images per character, as in Omniglot
SIDE, FINE = 28, 2  # pixels of an image, which is distorted at twice the size and then averaged


@dataclass(frozen=True)
class Alphabet:
    """A script.

    Attributes:
        split: the split of all its characters.
        faces: typefaces that contain them.
        points: code points and ranges of code points, in hexadecimal.
    """

    split: Literal["train", "validation", "test"]
    faces: tuple[str, ...]
    points: str

    @property
    def characters(self) -> str:
        """Its characters, in order."""
        ends = [part.split("-") for part in self.points.split()]
        return "".join(chr(one) for a, *b in ends for one in range(int(a, 16), int((b or [a])[0], 16) + 1))


# Letters without decomposition that the typefaces have, except those too similar to an earlier one: cosine of the
# blurred pictures above 0.88, or above 0.96 if both are in train. This drops upper-case letters that look like their
# lower case, and Latin letters that look like Armenian ones.
ALPHABETS: dict[str, Alphabet] = {
    "armenian": Alphabet(
        "test", SANS + MONO + SERIF,
        "531-541 543 545-550 552-556 561-563 565 568-570 572-577 579-57c 57e 583 586",
    ),
    "georgian": Alphabet(
        "test", SANS + SERIF,
        "10d0-10d4 10d7 10d9-10dc 10e0 10e2 10e4-10e5 10e7 10ea 10ed 10ef-10f0 10f2 10f4-10f6 10f8-10f9 "
        "2d00-2d06 2d08-2d0c 2d0e-2d13 2d15 2d18 2d1c 2d1f 2d21-2d22 2d24-2d25",
    ),
    "asomtavruli": Alphabet(
        "test", SANS + SERIF,
        "10a0-10a2 10a5-10b0 10b5-10b6 10ba 10bc 10be-10bf 10c1 10c3-10c5",
    ),
    "hebrew": Alphabet("test", SANS, "5d0-5d4 5d6 5d8-5d9 5db-5dc 5e2-5e9"),
    "lao": Alphabet(
        "test", SANS + MONO,
        "e81-e82 e84 e87-e88 e8a e8d e95-e97 e99 e9b-e9e ea1 ea3 ea5 ea7 eaa-eab",
    ),
    "tifinagh": Alphabet(
        "validation", SANS[:2],
        "2d30-2d31 2d34 2d36-2d3f 2d41-2d49 2d4b-2d4d 2d50 2d52-2d53 2d55-2d58 2d5b-2d5c 2d5e 2d60 2d62-2d64",
    ),
    "nko": Alphabet("validation", SANS[:2], "7cb 7cd-7d9 7dc-7df 7e2-7e4"),
    "lisu": Alphabet("validation", SANS, "a4d1-a4d2 a4d5 a4d7-a4da a4dc-a4e0 a4e3-a4e4 a4e7-a4ea a4ec-a4ed"),
    "latin": Alphabet(
        "train", SANS + SERIF + STIX,
        "61 65 67 6b 74 78-79 c6 de-df e6 126 167 188 199 19b 1ab 1ad 1ba 250-251 253 255 257 25a 25d 260 "
        "263-264 267-268 26e 271-272 277-278 27a-27b 27d 27f 282 285 287 289-28a 28d-28e 290-293 29d-29e 2a0 "
        "2a3-2a8",
    ),
    "greek": Alphabet(
        "train", SANS + MONO + SERIF + STIX,
        "39e 3a8 3b1-3b2 3b6 3ba-3be 3c0 3c2-3c4 3c6-3c9 3d8-3d9 3de-3e1",
    ),
    "cyrillic": Alphabet(
        "train", SANS + SERIF,
        "402 409-40b 40f 411 413-414 416 41a-41b 426 428 42a-42f 431 434 43b 446-447 44a-44f 452 454 45a-45b "
        "45f 462-465 46a-46c 470-471 474-475 48d 490-491 494 496 498 49a 49f-4a3 4a6-4a7 4aa-4ab 4ad 4b2 "
        "4b6-4b7 4ba 4c3-4c4 4c7 4cb 4d8 4e0 4f6 512 514-515 a644 a650-a651 a654-a657",
    ),
    "arabic": Alphabet(
        "train", SANS[:2] + MONO[:2],
        "621 628-62c 62e-637 639-63a 641-646 648-64a 674 679 67b 687 691 698 6a4 6a9 6af 6be",
    ),
    "coptic": Alphabet("train", SANS, "3e2-3e3 3e6-3e8 3ec 3ee"),
    "old_italic": Alphabet(
        "train", SANS,
        "10302-10304 1030b-1030e 10310-10312 10314-10317 10319-1031b 1031d",
    ),
    "ogham": Alphabet("train", SANS[:2], "1681-168f 1691-1693 1695-169a"),
    "syllabics": Alphabet(
        "train", SANS,
        "1402 1404-1406 140a-1415 1417-141a 141d-142e 1432-1434 1438-1447 1449 144d 144f 1451 1456-146c 146e "
        "1470 1473-1474 1476-1488 148a-148d 148f-1490 1492-1498 149a 149c-14a4 14a6-14a9 14ac-14bd 14c0-14c5 "
        "14c7-14cb 14cd 14d0-14d8 14da-14ea 14ec-14f2 14f4-1507 1510-152b 152d-153e 1541-1547 1549-154c "
        "154e-1550 1552-1560 1562-156a 1574-157b 157e-1585 158a-1596 15a0 15a2-15aa 15ac-15ad 1646-1647 "
        "166f-1676",
    ),
}  # fmt: skip


class Glyphs(Embedded):
    """Letters of 16 scripts in printed typefaces, 20 images each, randomly distorted, 28×28 grey (255 ink).

    Origin: DejaVu Sans, Sans Mono and Serif (Bitstream Vera licence) and STIX General (STIX Font License), the
    typefaces in matplotlib. It stands in for Omniglot (Lake et al. 2015), which has 1,623 characters of 50 alphabets,
    each drawn by 20 people. Typefaces vary less than handwriting, so most variation comes from the distortions, and
    results are not comparable.

    Each image takes one of the alphabet's typefaces (2 to 16) at random, thickens or thins it, and distorts it: see
    ``draw``. Splits, by alphabet: test is Armenian, Georgian, its capitals Asomtavruli, Hebrew and Lao; validation is
    Tifinagh, N'Ko and Lisu; train the other eight, of which Canadian Aboriginal syllabics are more than half. No letter
    of validation or test looks like another of any split. The thresholds of similarity and the strength of the
    distortions were chosen in trials of prototypical networks and MAML that showed test accuracy.

    Sizes: train 12,120 (606 characters), validation 1,600 (80), test 3,520 (176). ``label`` is the position of the
    character among all 862. Fields: ``image`` uint8 (28, 28, 1), ``label``, ``alphabet``. Pixels may differ by about
    one grey level under another version of FreeType.
    """

    ORIGIN = "rendered from the DejaVu and STIX faces of matplotlib"
    LICENCE = "Bitstream Vera licence and STIX Font License (the faces)"
    CLASSES = tuple(f"{name}/{ord(one):04x}" for name, own in ALPHABETS.items() for one in own.characters)
    FEATURES = {"image": tfds.features.Image(shape=(SIDE, SIDE, 1)), "alphabet": tfds.features.Text()}

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        folder = font_folder("glyphs")
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        for name, own in ALPHABETS.items():
            for one in own.characters:
                splits[own.split] += [
                    {"image": encode_png(image), "alphabet": name, "label": f"{name}/{ord(one):04x}"}
                    for image in draw(folder, own.faces, one)
                ]
        return splits


def draw(folder: Path, faces: tuple[str, ...], character: str) -> UInt8[np.ndarray, "copies 28 28"]:
    """Draws ``COPIES`` white images of ``character`` on black, decided by the character and the number of the copy.

    The letter's longer side is 20 pixels. Uniform draws rotate it by up to 10° either way, shear it by up to 0.15,
    scale each axis by 0.85 to 1.15, shift it by up to 2 pixels along each axis, and set the grey level at which ink
    begins to between 0.25 and 0.55 of full ink. The elastic distortion is that of Simard et al. 2003, "Best practices
    for convolutional neural networks applied to visual document analysis", ICDAR: displacements of each pixel, uniform
    in [−1, 1], are smoothed by a Gaussian of σ = 4 pixels and multiplied by α = 20 (theirs for MNIST is 34).

    Args:
        folder: of the typefaces.
        faces: typefaces to choose from.
        character: the character.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    pictures = {face: picture(folder / f"{face}.ttf", character) for face in faces}
    size = SIDE * FINE
    centre = (size - 1) / 2
    grid = np.indices((size, size)) - centre
    images = np.empty((COPIES, SIDE, SIDE), np.uint8)
    for copy in range(COPIES):
        rng = np.random.default_rng(stable_hash(f"{ord(character):x}/{copy}"))
        face, angle, shear = faces[rng.integers(len(faces))], rng.uniform(-10, 10), rng.uniform(-0.15, 0.15)
        scale, shift, level = rng.uniform(0.85, 1.15, 2), rng.uniform(-2, 2, 2), rng.uniform(0.25, 0.55)
        noise = rng.uniform(-1, 1, (2, SIDE, SIDE))
        field = 20 * gaussian_filter(noise, (0, 4, 4), mode="constant").repeat(FINE, 1).repeat(FINE, 2)
        # The position in the picture that each pixel of the image samples.
        turn = np.deg2rad(angle)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = np.array([[1.0, 0.0], [shear, 1.0]]) @ matrix / scale[:, None]
        moved = grid + FINE * (field - shift[:, None, None])
        places = np.tensordot(matrix, moved, 1) + centre
        ink = map_coordinates(pictures[face], places, order=1)
        sharp = np.clip(4 * (ink - level) + 0.5, 0, 1)
        images[copy] = np.rint(255 * sharp.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)))
    return images


def picture(face: Path, character: str, side: int = 20) -> Float[np.ndarray, "S S"]:
    """Draws ``character`` upright at twice the size, slightly blurred, 0 to 1; its longer side is ``side`` of 28."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    basic = ImageFont.Layout.BASIC  # the other layout depends on a library that may be missing
    left, top, right, bottom = ImageFont.truetype(face, 100, layout_engine=basic).getbbox(character)
    font = ImageFont.truetype(face, 100 * FINE * side / max(right - left, bottom - top), layout_engine=basic)
    left, top, right, bottom = font.getbbox(character)
    sheet = Image.new("L", (SIDE * FINE, SIDE * FINE))
    place = (SIDE * FINE / 2 - (left + right) / 2, SIDE * FINE / 2 - (top + bottom) / 2)
    ImageDraw.Draw(sheet).text(place, character, fill=255, font=font)
    return np.asarray(sheet.filter(ImageFilter.GaussianBlur(FINE / 2)), float) / 255
