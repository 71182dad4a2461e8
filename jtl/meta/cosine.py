"""Baseline++: a classifier by cosine similarity, the transfer-learning baseline of few-shot classification.

Chen et al. 2019, "A Closer Look at Few-shot Classification", https://arxiv.org/abs/1904.04232.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from jtl.meta.metric import unit


class Cosine(nn.Module):
    """Logits ``scale · cos(x, w_k)``: ``jtl.heads.attach(model, Cosine(classes), on="features", width=D, key=key)``.

    The baseline: train body and head on all training classes, then freeze the body and fit a new head to each task
    (``adapt`` with ``labels=jtl.finetune.train_only(model, "head/.*")``).

    Attributes:
        classes: C.
        scale: factor of the similarities before the softmax; the authors' code uses 2 for up to 200 classes.
    """

    classes: int
    scale: float = 2.0

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], *, train: bool = False) -> Float[Array, "B C"]:
        """Returns logits."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.classes))
        return self.scale * (unit(x) @ unit(kernel.T).T)
