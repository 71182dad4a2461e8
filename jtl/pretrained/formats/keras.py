"""``.weights.h5`` files of Keras 3 (https://keras.io/api/models/model_saving_apis), read with h5py only.

In the file, each layer has a group ``vars`` with its arrays by number and the layer's name as an attribute.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors, required

TORCH = {
    2: (1, 0),
    4: (3, 2, 0, 1),
}  # permutations to torch's kernel layout: (out, in), (out, in, height, width)
KNOWN = r"(.*/)?(conv2d|dense)(_\d+)?"  # layers with a kernel and a bias, by path or name


def read_keras(file: Path) -> Tensors:
    """Return the tensors of a file under the names of their layers, read on access.

    Arrays of Conv2D and Dense are called ``block1_conv1/kernel``, in torch's layout, and ``block1_conv1/bias``; those
    of other layers ``norm/0``, ``norm/1`` and so on, unchanged. If two layers share a name, their path in the file is
    used.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        FormatError: the file is truncated or damaged, or is not a weight file of Keras 3.
    """
    h5py = required("h5py", file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"No weight file {file}.")
    places: dict[str, str] = {}  # path of each array -> name of its layer

    def visit(path: str, item: object) -> None:
        layer, _, last = path.rpartition("/vars/")
        if isinstance(item, h5py.Dataset):
            if not last.isdigit():
                raise FormatError(
                    f"{file}: expected arrays in groups `vars`, as Keras 3 writes them, found {path!r}: save the model "
                    "anew, by model.save_weights('NAME.weights.h5')."
                )
            places[path] = str(item.parent.attrs.get("name", layer))

    try:
        with h5py.File(file, "r") as content:
            content.visititems(visit)  # follows no link out of the file
    except OSError as error:
        raise FormatError(
            f"{file} ({Path(file).stat().st_size} bytes) is not a complete HDF5 file: {error}. Fetch it again."
        ) from error
    owners = Counter(name for name, _ in {(name, path.rpartition("/")[0]) for path, name in places.items()})
    readers = {}
    for path, name in places.items():
        layer, number = path.split("/vars/")
        known = re.fullmatch(KNOWN, layer) or re.fullmatch(KNOWN, name)
        part = {"0": "kernel", "1": "bias"}.get(number, number) if known else number
        readers[f"{name if owners[name] == 1 else layer}/{part}"] = partial(
            _read, file, path, part == "kernel"
        )
    return Tensors(readers)


def _read(file: Path, path: str, kernel: bool) -> np.ndarray:
    h5py = required("h5py", file)
    try:
        with h5py.File(file, "r") as content:
            array = content[path][()]
    except OSError as error:
        raise FormatError(f"{file}: array {path!r} cannot be read: {error}") from error
    return array.transpose(TORCH[array.ndim]) if kernel and array.ndim in TORCH else array
