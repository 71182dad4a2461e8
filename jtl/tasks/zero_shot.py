"""Zero-shot image classification from class names, by a model that embeds images and texts, such as CLIP.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
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
    """Returns ``model`` with a classification head made of the class names' text embeddings, without training.

    The head is linear without bias on ``image_embeds``; its kernel (P, C) holds the class embeddings times
    exp(``logit_scale``). It outputs ``logits`` (B, C), and can be evaluated and fine-tuned like any other (Wortsman et
    al. 2021, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903, start fine-tuning from it).

    Args:
        model: outputs ``image_embeds`` and ``text_embeds`` and has a ``logit_scale``, such as CLIP.
        tokenizer: the model's own, of ``transformers``: see ``jtl.pretrained.tokenizer``.
        classes: their names, in label order.
        templates: texts with ``{}`` for the name; see ``class_embeddings``.

    Raises:
        ValueError: there is no class or no template, a template lacks ``{}``, the model does not embed texts, or the
            tokenizer belongs to another model.
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
    """Returns the unit-length embedding of each class, the mean over its templates (section 3.1.4, "ensembling").

    Arguments and errors are those of ``zero_shot``.
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
