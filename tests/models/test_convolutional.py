"""ResNet and ConvNeXt: against committed outputs of `transformers`, and what must hold by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files, outputs, shapes

from experiments.models.random_models import batch, build, files, run, settings
from experiments.models.vision_models import CONVOLUTIONAL
from jtl import adapters, finetune, heads
from jtl.model import cast, modules
from jtl.models import ARCHITECTURES
from jtl.pretrained import load, save
from jtl.tree import flatten


@pytest.fixture(scope="module", params=CONVOLUTIONAL)
def reference(request):
    config, weights, inputs, theirs = read(request.param)
    return from_files(request.param, config, weights), inputs, theirs


@jax.jit
def forward(model, inputs):
    return model(inputs)


def test_committed_outputs(reference):
    model, inputs, theirs = reference
    assert sum(name.startswith("encoder/stage") for name in theirs) == len(model.config.depths) == 2
    for name, value in outputs(model, inputs, theirs).items():
        assert error(value, theirs[name]) < 1e-4, name


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("seed", range(4))
def test_name_map_and_config(name, seed):
    written = settings(name, np.random.default_rng(seed)) | {"model_type": name}
    config = ARCHITECTURES[name].config.from_hf(written)
    tensors = ARCHITECTURES[name].tensors(config)
    assert set(tensors) == set(shapes(ARCHITECTURES[name], config))
    assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
    assert ARCHITECTURES[name].config.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ARCHITECTURES[name].config.from_hf(written))


def test_another_number_of_channels_is_refused(reference):
    model, _, _ = reference
    C = model.config.num_channels
    with pytest.raises(ValueError, match=rf"expected shape \(B, H, W, {C}\), found \(1, 32, 32, {C + 1}\)"):
        model(jnp.zeros((1, 32, 32, C + 1)))


def test_bfloat16(reference):
    model, inputs, theirs = reference
    assert error(forward(cast(model, jnp.bfloat16), inputs)["pooled"], theirs["pooled"]) < 0.1


def test_what_the_techniques_find(reference, key):
    """Taps of stages and blocks, adapters of convolutions, rates by depth, a head, and a saved folder."""
    model, inputs, _ = reference
    taps = ("encoder/stage_0", "encoder/stage_1/block_0", "encoder/stage_1/block_1", "encoder/stage_1")
    pyramid = jax.jit(lambda model: model(inputs, taps=taps))(model)
    np.testing.assert_array_equal(pyramid["taps"][taps[2]], pyramid["taps"][taps[3]])
    np.testing.assert_array_equal(pyramid["taps"][taps[3]], pyramid["map"])
    assert [pyramid["taps"][tap].shape[-1] for tap in taps[:2]] == list(model.config.hidden_sizes)

    depth = flatten(finetune.depths(heads.classifier(model, 3, key=key)))
    blocks = ("stage_0/block_0", "stage_1/block_0", "stage_1/block_1")
    by_block = [{d for path, d in depth.items() if path.startswith(f"encoder/{block}")} for block in blocks]
    assert all(len(found) == 1 for found in by_block)
    order = [min(found) for found in by_block]
    assert order == sorted(order) and len({*order}) == 3
    assert {d for path, d in depth.items() if path.startswith("embeddings")} == {0}
    assert depth["head/out/kernel"] == max(depth.values()) > order[-1]

    kinds = modules(model, inputs)
    where = "encoder/stage_1/.*/(conv_[0-9]|intermediate|output|depthwise)"
    adapted = adapters.lora(model, rank=2, where=where, key=key)
    np.testing.assert_array_equal(forward(adapted, inputs)["map"], pyramid["map"])
    added = {path.split("/lora/")[0] for path in flatten(adapted.params) if "/lora/" in path}
    assert len(added) == 6 and {kinds[path].__name__ for path in added} <= {"Conv", "Dense"}
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    assert (
        error(forward(adapters.merge(moved), inputs)["map"], np.asarray(forward(moved, inputs)["map"])) < 1e-4
    )

    scales = flatten(finetune.train_only(model, ".*norm/(scale|bias)"))
    assert sum(scales.values()) == sum(
        path.endswith(("/scale", "/bias")) and "norm" in path for path in scales
    )


def test_a_saved_folder(reference, tmp_path, key):
    model, inputs, _ = reference
    model = heads.classifier(model, 3, key=key)
    back = load(save(model, tmp_path / "saved"))
    assert back.config == model.config
    before, after = flatten(model.variables), flatten(back.variables)
    assert list(before) == list(after)
    assert all(np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes() for path in before)
    np.testing.assert_array_equal(forward(back, inputs)["logits"], forward(model, inputs)["logits"])


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_outputs_live(name, seed):
    rng = np.random.default_rng(seed)
    config = settings(name, rng)
    torch_model = build(name, config)
    written, weights = files(torch_model)
    model = from_files(name, written, weights)
    inputs = batch(name, written, rng)
    theirs = run(name, torch_model, inputs)
    for output, value in outputs(model, inputs, theirs).items():
        assert error(value, theirs[output]) < 1e-4, (output, config)


@pytest.mark.parity
def test_transformers_opens_what_is_saved(reference, tmp_path):
    import transformers

    model, inputs, theirs = reference
    back, info = transformers.AutoModel.from_pretrained(
        save(model, tmp_path / "saved"), output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back).__name__ == ARCHITECTURES[model.config.model_type].base_class
    for name, value in run(model.config.model_type, back.eval(), inputs).items():
        assert error(value, theirs[name]) < 1e-5, name


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers
def test_peft_opens_adapters(reference, tmp_path, key):
    import transformers
    from peft import PeftModel

    model, inputs, _ = reference
    adapted = adapters.lora(model, rank=2, where="encoder/.*/(conv_[0-9]|intermediate|output)", key=key)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.05 * ("lora" in jax.tree_util.keystr(path)), adapted.params
    )
    adapted = adapted.with_params(moved)
    adapters.peft.save(adapted, tmp_path / "adapter")
    base = transformers.AutoModel.from_pretrained(save(model, tmp_path / "base"))
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval().base_model.model
    theirs = run(model.config.model_type, opened, inputs)
    assert error(forward(adapted, inputs)["map"], theirs["map"]) < 1e-4
    assert error(forward(model, inputs)["map"], theirs["map"]) > 1e-3
