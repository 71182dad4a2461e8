"""Every output, and the gradient of every parameter, against `transformers` with torch on random configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import error, from_files, outputs

from experiments.models.random_models import IMAGE, TEXT, batch, build, files, run, settings
from jtl.models import ARCHITECTURES
from jtl.models.parts.patches import bicubic
from jtl.tree import flatten

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", (*TEXT, *IMAGE))
def test_outputs(name, seed):
    rng = np.random.default_rng(seed)
    config = settings(name, rng)
    torch_model = build(name, config)
    written, weights = files(torch_model)
    model = from_files(name, written, weights)
    inputs = batch(name, written, rng, padded=seed % 4 > 0)
    theirs = run(name, torch_model, inputs)
    for output, value in outputs(model, inputs, theirs).items():
        assert error(value, theirs[output]) < 1e-4, (output, config)


@pytest.mark.parametrize("name", TEXT)
def test_gradients(name):
    import torch

    rng = np.random.default_rng(3)
    config = settings(name, rng)
    torch_model = build(name, config)
    written, weights = files(torch_model)
    model = from_files(name, written, weights)
    inputs = batch(name, written, rng)
    mask = inputs["attention_mask"][
        ..., None
    ]  # padding gets no loss: torch keeps its embedding's gradient at 0
    weight = (mask * rng.normal(size=(*mask.shape[:2], model.config.width("sequence")))).astype(np.float32)
    out = torch_model(**{key: torch.tensor(value).long() for key, value in inputs.items()})
    (out.last_hidden_state * torch.tensor(weight)).sum().backward()
    theirs = {key: value.grad for key, value in torch_model.named_parameters()}
    gradients = jax.grad(lambda model: (model(inputs)["sequence"] * weight).sum())(model)
    ours = flatten(gradients.variables)
    for path, tensor in ARCHITECTURES[name].tensors(model.config).items():
        reference = theirs[tensor.key]
        if reference is not None and not path.endswith(
            "key/bias"
        ):  # that of the key bias is 0 up to rounding
            assert error(tensor.layout.to_file(np.asarray(ours[path])), reference.numpy()) < 1e-4, path


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 14), (14, 37), (7, 7), (3, 11), (24, 5), (1, 4), (5, 1)])
def test_bicubic(old, new, antialias):
    import torch

    values = np.random.default_rng(0).normal(size=(2, old)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(values)[:, None, None],
        size=(1, new),
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )
    assert (
        error(jnp.einsum("no,bo->bn", bicubic(old, new, antialias), values), theirs[:, 0, 0].numpy()) < 1e-5
    )


@pytest.mark.parametrize("name", IMAGE)
def test_names_in_memory(name):
    """A state_dict that transformers v5 holds in memory reads as the same tensors."""
    model = build(
        name, settings(name, np.random.default_rng(0)) | ({"use_swiglu_ffn": False} if "dino" in name else {})
    )
    architecture = ARCHITECTURES[name]
    on_disk = files(model)[1]
    in_memory = {architecture.canonical(key): value.numpy() for key, value in model.state_dict().items()}
    assert set(in_memory) == set(on_disk)
    assert all(np.array_equal(in_memory[key], on_disk[key]) for key in on_disk)
