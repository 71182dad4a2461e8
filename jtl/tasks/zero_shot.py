"""A classifier of images out of the names of classes, by a model that embeds texts too (Radford et al. 2021, CLIP).

https://arxiv.org/abs/2103.00020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl import heads
from jtl.errors import InputError
from jtl.model import Model
from jtl.tasks.decode import check_ids

TEMPLATE = "a photo of a {}."  # the paper's


def zero_shot(
    model: Model,
    tokenizer: Any,
    classes: Sequence[str],
    templates: Sequence[str] = (TEMPLATE,),
) -> Model:
    """``model`` with a head whose ``logits`` (B, C) are those of its images and the classes' texts: nothing is trained.

    The head is linear, without bias, on ``image_embeds``, and its kernel (P, C) holds the embeddings of the classes
    times exp(``logit_scale``). It is evaluated and fine-tuned as any other (Wortsman et al. 2021, WiSE-FT,
    https://arxiv.org/abs/2109.01903, fine-tune from there).

    Args:
        model: one that gives ``image_embeds`` and ``text_embeds`` and has a ``logit_scale``, such as CLIP.
        tokenizer: the model's own, of ``transformers``: see ``jtl.pretrained.tokenizer``.
        classes: their names, in the order of the labels.
        templates: texts with ``{}`` for the name: see ``class_embeddings``.

    Raises:
        ValueError: no class, no template, one without ``{}``, a model that does not embed texts, or the tokenizer of
            another.
    """
    if "logit_scale" not in model.params:
        raise InputError(
            "zero_shot needs a model that embeds images and texts, with a logit_scale, such as CLIP"
        )
    embeddings = class_embeddings(model, tokenizer, classes, templates)
    kernel = jnp.exp(model.params["logit_scale"]) * embeddings.T
    module = heads.Classifier(len(classes), bias=False)
    return heads.attach(model, module, on="image_embeds", params={"out": {"kernel": kernel}})


def class_embeddings(
    model: Model, tokenizer: Any, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)
) -> Float[Array, "C P"]:
    """Embedding of each class, of length 1: the mean over the templates of its texts' (section 3.1.4, "ensembling").

    Arguments and errors as ``zero_shot``.
    """
    lacking = [template for template in templates if "{}" not in template]
    if not classes or not templates or lacking:
        raise InputError(
            f"expected classes and templates with {{}} in them, found {len(classes)} classes, templates {templates!r}"
        )
    texts = [template.format(name) for template in templates for name in classes]
    found = tokenizer(texts, padding=True, return_tensors="np")
    check_ids(found["input_ids"], getattr(model.config, "text", None))
    shape = (len(templates), len(classes), -1)  # one compilation serves all templates
    fields = [np.asarray(found[name], np.int32).reshape(shape) for name in ("input_ids", "attention_mask")]
    mean = sum(_embed(model, ids, mask) for ids, mask in zip(*fields, strict=True)) / len(templates)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@jax.jit
def _embed(model: Model, ids: Array, mask: Array) -> Float[Array, "C P"]:
    outputs = model({"input_ids": ids, "attention_mask": mask})
    if "text_embeds" not in outputs:
        raise InputError(f"zero_shot needs a model that gives text_embeds; this one gives {sorted(outputs)}")
    return outputs["text_embeds"]
