"""Makes the arrays in ``data/`` with torch: ``python tests/pretrained/make_reference.py``."""

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
SENTENCES = [
    "A film of quiet power, beautifully acted.",
    "Two hours that feel like five.",
    "The orchestra tuned while the late-comers were still looking for their seats in the dark.",
]


def state():
    """A state dict of small random tensors: types, strides, shared storages, an empty one and a scalar."""
    import torch

    torch.manual_seed(0)
    base = torch.randn(6, 5)
    return {
        "float32": torch.randn(3, 4),
        "transposed": base.t(),
        "every_other": base[::2, 1:],
        "shared": base[2],
        "expanded": torch.randn(4, 1).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 2).bfloat16(),
        "float64": torch.randn(3).double(),
        "int64": torch.arange(4),
        "int8": torch.arange(-2, 2, dtype=torch.int8),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.randn(2, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def arrays(tensors):
    """Those tensors as NumPy arrays, bfloat16 as the float32 of the same value."""
    import torch

    widened = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    return {name: t.detach().numpy() for name, t in widened.items()}


def minilm():
    """Inputs and outputs of transformers' MiniLM on the sentences."""
    import torch
    from transformers import AutoModel

    from jtl.pretrained import resolve, tokenizer

    batch = dict(tokenizer("minilm")(SENTENCES, padding=True, return_tensors="pt"))
    with torch.no_grad():
        out = AutoModel.from_pretrained(resolve("minilm")).eval()(**batch)
    mask = batch["attention_mask"][..., None]
    features = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    named = {**batch, "sequence": out.last_hidden_state, "pooled": out.pooler_output, "features": features}
    return {name: value.numpy() for name, value in named.items()}


if __name__ == "__main__":
    import torch

    DATA.mkdir(exist_ok=True)
    torch.save(state(), DATA / "zip.pth")
    torch.save(state(), DATA / "legacy.pth", _use_new_zipfile_serialization=False)
    np.savez(DATA / "state.npz", **arrays(state()))
    reference = minilm()
    reference["sequence"] = reference["sequence"][:, :2]  # two positions suffice, and stay small
    np.savez_compressed(DATA / "minilm.npz", **reference)
