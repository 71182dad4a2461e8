"""CTranslate2's files of Whisper: small ones that are written here, and Whisper base."""

import json
import struct

import jax
import numpy as np
import pytest

from jtl import tree
from jtl.models import ARCHITECTURES
from jtl.models.whisper import sinusoids
from jtl.models.whisper import tensors as name_map
from jtl.models.whisper_config import WhisperConfig
from jtl.pretrained import load, load_with_report, resolve, save, tokenizer
from jtl.pretrained.ctranslate2 import settings
from jtl.pretrained.formats import FormatError, read_ctranslate2, read_tensors
from jtl.pretrained.load import expected

CODES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
CONFIG = WhisperConfig(vocab_size=9, num_mel_bins=3, d_model=4, encoder_layers=1, encoder_attention_heads=2,
                       encoder_ffn_dim=5, decoder_layers=2, decoder_attention_heads=1, decoder_ffn_dim=6,
                       max_source_positions=4, max_target_positions=7, decoder_start_token_id=50257,
                       suppress_tokens=(1, 2), begin_suppress_tokens=(3,))  # fmt: skip
FLAGS = {"pre_norm": 1, "activation": 3, "alibi": 0, "scale_embeddings": 0, "start_from_zero_embedding": 0}


def whisper(rng):
    """Random tensors under Hugging Face's names and in its layout, in float16."""
    found = {}
    shapes = expected(ARCHITECTURES["whisper"].module(CONFIG), ARCHITECTURES["whisper"], CONFIG)
    for path, tensor in name_map(CONFIG).items():
        array = rng.normal(size=shapes[path].shape).astype(np.float16)
        found[tensor.key] = tensor.layout.to_file(array)
    return found


def fused(found):
    """As CTranslate2's converter of Whisper names and joins them, and its settings."""
    written, D = {}, CONFIG.d_model
    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        for name, key in (("gamma", "weight"), ("beta", "bias")):
            written[f"{side}/layer_norm/{name}"] = found[f"{top}.layer_norm.{key}"]
        written[f"{side}/position_encodings/encodings"] = found[f"{top}.embed_positions.weight"]
        written[f"{side}/num_heads"] = np.int16(2 if side == "encoder" else 1)
        for i in range(1 if side == "encoder" else 2):
            ours, layer = f"{side}/layer_{i}", f"{top}.layers.{i}"

            def rows(attention, projections, kind, layer=layer):
                zero = np.zeros(D, np.float16)  # the bias that keys have not
                return np.concatenate(
                    [found.get(f"{layer}.{attention}.{p}_proj.{kind}", zero) for p in projections]
                )

            for name, kind in (("gamma", "weight"), ("beta", "bias")):
                written[f"{ours}/self_attention/layer_norm/{name}"] = found[
                    f"{layer}.self_attn_layer_norm.{kind}"
                ]
                written[f"{ours}/ffn/layer_norm/{name}"] = found[f"{layer}.final_layer_norm.{kind}"]
                if side == "decoder":
                    written[f"{ours}/attention/layer_norm/{name}"] = found[
                        f"{layer}.encoder_attn_layer_norm.{kind}"
                    ]
            for kind in ("weight", "bias"):
                written[f"{ours}/self_attention/linear_0/{kind}"] = rows("self_attn", "qkv", kind)
                written[f"{ours}/self_attention/linear_1/{kind}"] = rows("self_attn", ["out"], kind)
                for j in (0, 1):
                    written[f"{ours}/ffn/linear_{j}/{kind}"] = found[f"{layer}.fc{j + 1}.{kind}"]
                if side == "decoder":
                    for j, projections in enumerate(("q", "kv", ["out"])):
                        written[f"{ours}/attention/linear_{j}/{kind}"] = rows(
                            "encoder_attn", projections, kind
                        )
    for i in (1, 2):
        for kind in ("weight", "bias"):
            written[f"encoder/conv{i}/{kind}"] = found[f"model.encoder.conv{i}.{kind}"]
    written["decoder/embeddings/weight"] = found["model.decoder.embed_tokens.weight"]
    return written | {f"decoder/{name}": np.int8(value) for name, value in FLAGS.items()}


def write(folder, variables, version=6, kind="WhisperSpec"):
    def text(name):
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    content = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(variables))
    for name, array in sorted(variables.items()):
        array = np.asarray(array)
        content += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", CODES[array.dtype.name], array.nbytes) + array.tobytes()
    content += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    (folder / "model.bin").write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3]}))
    return folder / "model.bin"


def test_tensors_and_settings(tmp_path):
    expected = whisper(np.random.default_rng(0))
    write(tmp_path, fused(expected))
    model, report = load_with_report(tmp_path, dtype=None)
    assert model.config == CONFIG and report.ignored == report.new == ()
    leaves = tree.flatten(model.variables)
    for path, tensor in name_map(CONFIG).items():
        assert leaves[path].dtype == np.float16
        np.testing.assert_array_equal(
            tensor.layout.to_file(np.asarray(leaves[path])), expected[tensor.key], path
        )
    back = load(save(model, tmp_path / "saved"), dtype=None)
    assert back.config == model.config
    assert all(np.array_equal(leaf, leaves[path]) for path, leaf in tree.flatten(back.variables).items())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_cut_file(tmp_path, share):
    file = write(tmp_path, fused(whisper(np.random.default_rng(0))))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content)) - 20])
    with pytest.raises(FormatError, match="is not a complete CTranslate2 file.*fetch it again"):
        load(tmp_path)


def test_other_files(tmp_path):
    variables = fused(whisper(np.random.default_rng(0)))
    with pytest.raises(FormatError, match="expected version 6 of CTranslate2's format, found 5"):
        read_tensors(write(tmp_path, variables, version=5))
    with pytest.raises(FormatError, match="holds a TransformerSpec; .* only those of Whisper"):
        load(write(tmp_path, variables, kind="TransformerSpec").parent)
    with pytest.raises(FormatError, match="the setting decoder/activation=0 is not supported"):
        load(write(tmp_path, variables | {"decoder/activation": np.int8(0)}).parent)
    with pytest.raises(FormatError, match="the setting decoder/rotary_dim=2 is not supported"):
        load(write(tmp_path, variables | {"decoder/rotary_dim": np.int16(2)}).parent)
    name = "encoder/layer_0/ffn/linear_0/weight"
    with pytest.raises(FormatError, match=f"tensor '{name}' is quantised .int8."):
        read_tensors(write(tmp_path, variables | {name: variables[name].astype(np.int8)}))
    name = "encoder/layer_0/self_attention/linear_0/bias"
    with pytest.raises(FormatError, match=f"the keys of '{name}' have a bias"):
        read_tensors(write(tmp_path, variables | {name: np.ones_like(variables[name])}))
    with pytest.raises(FileNotFoundError, match="No weight file"):
        read_ctranslate2(tmp_path / "none.bin")


# --- Whisper base ------------------------------------------------------------------------------------


def test_whisper_base_is_whole():
    model, report = load_with_report("whisper-base")
    assert len(report.used) == 245 and report.ignored == report.new == ()
    assert tree.size(model.params) == 72_593_920  # as in table 1 of the paper: 74 M
    position = np.asarray(model.params["encoder"]["embeddings"]["position"]["embedding"])
    found = sinusoids(jax.random.key(0), position.shape)
    np.testing.assert_allclose(position, found, atol=2e-3)  # float16
    assert model.config.suppress_tokens[:3] == (1, 2, 7) and model.config.decoder_start_token_id == 50258


def test_tokenizer_of_whisper():
    words = tokenizer("whisper-base")
    ids = words(" Hello, caf\u00e9!", add_special_tokens=False)["input_ids"]
    assert words.decode(ids) == " Hello, caf\u00e9!"
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>"]
    assert words.convert_tokens_to_ids(names) == [50258, 50259, 50359, 50363, 50257]


@pytest.mark.slow
@pytest.mark.parity
def test_whisper_base_is_what_transformers_computes(tmp_path):
    """A saved folder opens there with every tensor, and gives the same logits for half a minute of noise."""
    import torch
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    from jtl.data.encode import spectrograms

    model = load("whisper-base")
    folder = save(model, tmp_path / "saved", tokenizer="whisper-base")
    theirs, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        AutoTokenizer.from_pretrained(folder)(" Hello").input_ids
        == tokenizer("whisper-base")(" Hello").input_ids
    )
    noise = (0.1 * np.random.default_rng(0).normal(size=300_000)).astype(np.float32)
    mels, ids = (
        spectrograms.log_mel(noise)[None],
        np.array([[50258, 50259, 50359, 50363, 2425, 1002]], np.int32),
    )
    with torch.no_grad():
        out = theirs.eval()(torch.tensor(mels).transpose(1, 2), decoder_input_ids=torch.tensor(ids).long())
    found = jax.jit(lambda m, b: m(b))(model, {"log_mel": mels, "decoder_input_ids": ids})
    for name, reference in (("token_logits", out.logits), ("encoded", out.encoder_last_hidden_state)):
        reference = reference.numpy()
        assert np.abs(np.asarray(found[name]) - reference).max() / np.abs(reference).max() < 1e-4, name
    assert settings(resolve("whisper-base") / "model.bin")["d_model"] == theirs.config.d_model
