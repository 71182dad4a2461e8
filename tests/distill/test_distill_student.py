"""Students cut out of their teachers, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters, distill, heads, measure, tree
from jtl.model import Linen, Model
from jtl.models.bert import Bert, BertConfig
from jtl.models.distilbert import DistilBert, DistilBertConfig
from jtl.models.vit import ViT, ViTConfig
from jtl.wrap import function

D, H, I = 12, 3, 20  # noqa: E741
CONFIG = BertConfig(
    vocab_size=30, hidden_size=D, num_hidden_layers=3, num_attention_heads=H, intermediate_size=I,
    max_position_embeddings=8,
)  # fmt: skip
BATCH = {"input_ids": jnp.arange(12).reshape(2, 6), "attention_mask": jnp.ones((2, 6), jnp.int32)}


def make(module, config, batch):
    """A model of random leaves, none of them near 0 or 1 as at initialisation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda batch: module(config).init(jax.random.key(0), **batch), batch)
    leaves = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.3, x.shape), jnp.float32), shapes)
    return Model(leaves, Linen(module(config)), config=config)


@pytest.fixture(scope="module")
def teacher():
    return heads.classifier(make(Bert, CONFIG, BATCH), 2, key=jax.random.key(2))


run = jax.jit(lambda model, batch: model(batch))


def test_a_student_of_chosen_layers_computes_with_them(teacher):
    student = distill.choose_layers(teacher, (0, 2))
    assert student.config.num_hidden_layers == 2 and student.config.hidden_size == D
    # Oracle: the layer left out as an identity. Post-norm layers of zero weights only normalise, which is the identity
    # on what a norm of scale 1 and bias 0 gave.
    params = tree.flatten(teacher.params)
    for path in params:
        if path.startswith(("encoder/layer_1/attention/output", "encoder/layer_1/mlp/output")):
            params[path] = jnp.zeros_like(params[path])
        if "_norm" in path and path.startswith(("encoder/layer_0/mlp", "encoder/layer_1")):
            params[path] = jnp.full_like(params[path], float(path.endswith("scale")))
    plain = teacher.with_params(tree.nest(params))
    cut = distill.choose_layers(plain, [0, 2])
    np.testing.assert_allclose(run(cut, BATCH)["logits"], run(plain, BATCH)["logits"], atol=1e-4)
    assert np.abs(run(student, BATCH)["logits"] - run(teacher, BATCH)["logits"]).max() > 1e-2
    for path, leaf in tree.flatten(student.params).items():
        assert leaf is tree.flatten(teacher.params)[path.replace("layer_1", "layer_2")], path


@pytest.mark.parametrize("name", ["vit", "distilbert"])
def test_layers_of_other_architectures(name):
    if name == "vit":
        image = {"image": jnp.ones((1, 8, 8, 3))}
        config = ViTConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        )
        model, batch = make(ViT, config, image), image
    else:
        config = DistilBertConfig(
            vocab_size=30, max_position_embeddings=8, n_layers=3, n_heads=2, dim=8, hidden_dim=16
        )
        model, batch = make(DistilBert, config, BATCH), BATCH
    student = distill.choose_layers(model, [1])
    assert tree.size(student.params["encoder"]) * 3 == tree.size(model.params["encoder"])
    shapes = [jax.eval_shape(lambda m: m(batch)["features"], m).shape for m in (student, model)]
    assert shapes[0] == shapes[1] == (len(next(iter(batch.values()))), 8)


def test_narrower_mlps_keep_the_neurons_that_weigh(teacher):
    params = tree.flatten(teacher.params)
    keep = {0: [1, 5, 19], 1: [0, 2, 3], 2: [7, 8, 9]}
    for layer, kept in keep.items():
        mask = jnp.zeros(I).at[jnp.array(kept)].set(1.0)
        at = f"encoder/layer_{layer}/mlp"
        params[f"{at}/output/kernel"] *= mask[:, None]
        params[f"{at}/intermediate/kernel"] *= 0.1 + mask[None]
    sparse = teacher.with_params(tree.nest(params))
    student = distill.choose_widths(sparse, intermediate=3)
    assert student.config.intermediate_size == 3
    np.testing.assert_allclose(
        run(student, BATCH)["logits"], run(sparse, BATCH)["logits"], rtol=1e-4, atol=1e-5
    )


def test_narrower_models_take_channels_by_their_norm(teacher):
    student = distill.choose_widths(teacher, hidden=4, heads=2)
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(teacher.params).items()}
    hidden = np.zeros(D)
    for path, x in leaves.items():
        for axis, size in enumerate(x.shape):
            skip = any(name in path for name in ("query", "key", "value")) and (axis == 1 or x.ndim == 1)
            skip |= "attention/output/kernel" in path and axis == 0
            if size == D and not skip:
                hidden += (x**2).sum(tuple(a for a in range(x.ndim) if a != axis))
    best = np.sort(np.argsort(-hidden)[:4])
    cut = {path: np.asarray(leaf) for path, leaf in tree.flatten(student.params).items()}
    np.testing.assert_array_equal(
        cut["embeddings/word/embedding"], leaves["embeddings/word/embedding"][:, best]
    )
    np.testing.assert_array_equal(cut["pooler/kernel"], leaves["pooler/kernel"][np.ix_(best, best)])
    np.testing.assert_array_equal(cut["head/out/kernel"], leaves["head/out/kernel"][best])
    at = "encoder/layer_1/attention"
    sides = {"keys": ("query", "key"), "values": ("value",)}
    norms = {
        side: sum((leaves[f"{at}/{n}/kernel"] ** 2).sum(0) + leaves[f"{at}/{n}/bias"] ** 2 for n in names)
        for side, names in sides.items()
    }
    norms["values"] = norms["values"] + (leaves[f"{at}/output/kernel"] ** 2).sum(1)
    chosen = np.sort(np.argsort(-(norms["keys"] + norms["values"]).reshape(H, 4).sum(1))[:2])
    inner = {
        side: np.concatenate([h * 4 + np.sort(np.argsort(-x.reshape(H, 4)[h])[:2]) for h in chosen])
        for side, x in norms.items()
    }
    np.testing.assert_array_equal(
        cut[f"{at}/key/kernel"], leaves[f"{at}/key/kernel"][np.ix_(best, inner["keys"])]
    )
    scaled = leaves[f"{at}/query/kernel"][np.ix_(best, inner["keys"])] * 0.5**0.5
    np.testing.assert_allclose(cut[f"{at}/query/kernel"], scaled, rtol=1e-6)
    taken = np.ix_(inner["values"], best)
    np.testing.assert_array_equal(cut[f"{at}/output/kernel"], leaves[f"{at}/output/kernel"][taken])
    assert np.isfinite(run(student, BATCH)["logits"]).all()
    same = distill.choose_widths(teacher)
    np.testing.assert_array_equal(run(same, BATCH)["logits"], run(teacher, BATCH)["logits"])


def test_a_cut_that_cannot_be_made_is_named(teacher):
    plain = function(lambda params, x: x, {"w": jnp.ones(1)})
    adapted = adapters.lora(teacher, rank=2, where=".*/query", key=jax.random.key(0))
    for call, message in (
        (lambda: distill.choose_layers(teacher, [0, 3]), "from 0 to 2, got"),
        (lambda: distill.choose_layers(teacher, [1, 0]), "ascending"),
        (lambda: distill.choose_layers(teacher, []), "ascending"),
        (lambda: distill.choose_layers(teacher, [0], stack="blocks/"), "name the stack"),
        (lambda: distill.choose_layers(plain, [0]), "rebuilds models of jtl.models"),
        (lambda: distill.choose_layers(adapted, [0]), "merge adapters"),
        (lambda: distill.choose_widths(adapted, intermediate=4), "merge adapters"),
        (lambda: distill.choose_widths(teacher, intermediate=I + 1), "keeps 1 to 20"),
        (lambda: distill.choose_widths(teacher, hidden=8), "whole number"),
        (lambda: distill.choose_widths(teacher, heads=2), "at most the teacher's 4"),
        (lambda: distill.choose_widths(plain), "knows BERT and RoBERTa"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_size_of_a_model(teacher):
    large = measure.forward(teacher, BATCH, runs=2)
    small = measure.forward(distill.choose_layers(teacher, [0]), BATCH, runs=0)
    layer = tree.size(teacher.params["encoder"]) // 3
    assert large.parameters == tree.size(teacher.params) == small.parameters + 2 * layer
    assert large.flops > 1.5 * small.flops and large.bytes >= 4 * large.parameters * 0.9
    assert large.seconds > 0 and small.seconds is None
    with pytest.raises(KeyError, match="gives no 'logit'"):
        measure.forward(teacher, BATCH, output="logit")
