"""Committed outputs of small random models of `transformers`, for tests without torch; run to write references/*.npz.

    python -m tests.models.references [NAME ...]

Each file holds one model: `settings` (JSON: the config, and the shape of each weight by its key, as
`save_pretrained` writes them), `weights` (all of them, flat), `input/NAME` and `output/NAME`.
test_models.py compares with the files, test_parity.py with live models of other seeds.
Needs torch (the `parity` extra).
"""

import json
import sys
from pathlib import Path

import numpy as np

from experiments.models.random_models import NAMES, batch, build, files, run, settings

REFERENCES = Path(__file__).parent / "references"


def main():
    """Write one small file for each architecture, or for those named."""
    for name in sys.argv[1:] or NAMES:
        rng = np.random.default_rng(0)
        config = settings(name, rng, small=True)
        model = build(name, config)
        written, weights = files(model)
        weights = {
            key: value for key, value in weights.items() if value.dtype.kind == "f"
        }  # no batch counters
        inputs = batch(name, config, rng)
        arrays = {f"input/{key}": value for key, value in inputs.items()}
        arrays |= {f"output/{key}": value for key, value in run(name, model, inputs).items()}
        settled = {"config": written, "shapes": {key: value.shape for key, value in weights.items()}}
        flat = np.concatenate([value.ravel() for value in weights.values()])
        np.savez_compressed(REFERENCES / f"{name}.npz", settings=json.dumps(settled), weights=flat, **arrays)


def read(name):
    """The config, weights, inputs and outputs of a file that `main` wrote."""
    with np.load(REFERENCES / f"{name}.npz", allow_pickle=False) as file:
        settled, arrays = json.loads(str(file["settings"])), dict(file)
    shapes = {key: tuple(shape) for key, shape in settled["shapes"].items()}
    parts = np.split(
        arrays["weights"], np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])[:-1]
    )
    weights = {key: part.reshape(shape) for part, (key, shape) in zip(parts, shapes.items(), strict=True)}
    inputs, outputs = (
        {key.removeprefix(kind): value for key, value in arrays.items() if key.startswith(kind)}
        for kind in ("input/", "output/")
    )
    return settled["config"], weights, inputs, outputs


if __name__ == "__main__":
    main()
