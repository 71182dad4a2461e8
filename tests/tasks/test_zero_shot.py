"""A classifier out of the names of classes: its formula, and fine-tuning from there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import CLIPTokenizer

from jtl import heads
from jtl.finetune import train_only
from jtl.model import linen
from jtl.models.clip import CLIP
from jtl.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jtl.tasks import Classify, class_embeddings, zero_shot
from jtl.train import make_step

WORDS = ("a</w>", "photo</w>", "of</w>", "drawing</w>", "cat</w>", "dog</w>", "bird</w>", ".</w>")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's own, of single letters and a few words."""
    letters = "abcdefghijklmnopqrstuvwxyz."
    merges, known = [], {}
    for piece in (*letters, *(f"{letter}</w>" for letter in letters)):
        known.setdefault(piece, len(known))
    for word in WORDS[:-1]:
        parts = [*word.removesuffix("</w>")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            known.setdefault(parts[0], len(known))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        known[special] = len(known)
    return CLIPTokenizer(vocab=known, merges=list(dict.fromkeys(merges)))


@pytest.fixture(scope="module")
def model(tokenizer):
    ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    small = dict(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
    )
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **small, **ends)
    config = CLIPConfig(text, CLIPVisionConfig(image_size=4, patch_size=2, **small), projection_dim=6)
    module = CLIP(config)
    example = {"image": jnp.zeros((1, 4, 4, 3)), "input_ids": jnp.zeros((1, 3), jnp.int32)}
    return linen(module, jax.jit(module.init)(jax.random.key(0), **example)).replace(config=config)


def test_logits_are_those_of_images_and_texts(model, tokenizer, key):
    """With one template, what CLIP gives for images and the classes' texts together."""
    image = jax.random.normal(key, (5, 4, 4, 3))
    found = tokenizer([TEMPLATES[0].format(name) for name in CLASSES], padding=True, return_tensors="np")
    ids = {name: np.asarray(found[name], np.int32) for name in ("input_ids", "attention_mask")}
    assert len({tuple(row) for row in ids["input_ids"]}) == 3
    together = model({"image": image, **ids})["logits_per_image"]
    classifier = zero_shot(model, tokenizer, CLASSES)
    logits = classifier({"image": image})["logits"]
    np.testing.assert_allclose(logits, together, rtol=1e-4, atol=1e-4)
    assert np.abs(logits).max() > 1 and heads.find(classifier).on == "image_embeds"


def test_templates_are_averaged(model, tokenizer):
    each = [class_embeddings(model, tokenizer, CLASSES, (template,)) for template in TEMPLATES]
    mean = np.mean(each, 0)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(class_embeddings(model, tokenizer, CLASSES, TEMPLATES), expected, atol=1e-5)
    assert np.abs(each[0] - each[1]).max() > 1e-3


def test_fine_tuning_goes_on_from_there(model, tokenizer, key):
    classifier = zero_shot(model, tokenizer, CLASSES)
    batch = {"image": jax.random.normal(key, (6, 4, 4, 3)), "label": jnp.arange(6) % 3}
    step = make_step(
        Classify(), optax.adam(1e-2), train_only(classifier, "vision/.*|image_projection/.*|head/.*")
    )
    state = step.init(classifier, jax.random.key(1))
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    frozen = state.model.params["text"]["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(frozen, classifier.params["text"]["embeddings"]["word"]["embedding"])


@pytest.mark.parametrize(("classes", "templates"), [((), TEMPLATES), (CLASSES, ()), (CLASSES, ("a photo.",))])
def test_what_is_refused(model, tokenizer, classes, templates):
    with pytest.raises(ValueError, match="expected classes and templates with {}"):
        zero_shot(model, tokenizer, classes, templates)
    with pytest.raises(ValueError, match="with a logit_scale, such as CLIP"):
        zero_shot(model.with_params({"vision": model.params["vision"]}), tokenizer, CLASSES)


def test_the_tokenizer_of_another_model(model, tokenizer):
    text = dataclasses.replace(model.config.text, vocab_size=len(tokenizer) - 1)
    smaller = model.replace(config=dataclasses.replace(model.config, text=text))
    with pytest.raises(ValueError, match=f"input_ids holds the token {len(tokenizer) - 1}, .* own tokenizer"):
        zero_shot(smaller, tokenizer, CLASSES)
