"""GGUF files: SmolLM2's, and small ones that the `gguf` package writes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import tree
from jtl.pretrained import load, load_with_report, resolve, save, scratch, tokenizer
from jtl.pretrained.formats import FormatError, read_gguf, read_tensors
from jtl.pretrained.gguf import settings
from jtl.pretrained.load import WeightsError

SHAPE = {
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
FLOATS = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500.0}
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def tensors(rng):
    """Those of a Llama of 17 words with a tied table, under GGUF's names and as Hugging Face lays them out."""
    sizes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
             "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}  # fmt: skip
    shapes = {"token_embd.weight": (17, 64), "output_norm.weight": (64,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in sizes.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def llama_cpp(name, array):
    """The order of rows in which llama.cpp keeps queries and keys: `permute` of its convert_hf_to_gguf.py."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def write(file, arrays, kind="llama", **more):
    """A GGUF file with matrices in blocks of Q4_1, the table in float16, and what these hold once dequantised."""
    writer = gguf.GGUFWriter(file, kind)
    for key, value in (SHAPE | more).items():
        writer.add_string(f"{kind}.{key}", value) if isinstance(value, str) else writer.add_uint32(
            f"{kind}.{key}", value
        )
    for key, value in FLOATS.items():
        writer.add_float32(f"{kind}.{key}", value)
    writer.add_token_list([str(i) for i in range(17)])
    read = {}
    for name, array in arrays.items():
        if array.ndim == 2 and name != "token_embd.weight":
            blocks = gguf.quantize(llama_cpp(name, array), Q4_1)
            writer.add_tensor(name, blocks, raw_dtype=Q4_1)
            read[name] = gguf.dequantize(gguf.quantize(array, Q4_1), Q4_1)  # rows move whole
        else:
            stored = array.astype(np.float16) if array.ndim == 2 else array
            writer.add_tensor(name, stored)
            read[name] = stored.astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "tiny.gguf", tensors(np.random.default_rng(0)))
    return tmp_path


def test_tensors_and_settings(tmp_path):
    expected = write(tmp_path / "tiny.gguf", tensors(np.random.default_rng(0)))
    found = read_tensors(tmp_path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    model, report = load_with_report(tmp_path)
    assert report.ignored == report.new == () and set(report.used.values()) == set(expected)
    query = model.params["decoder"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(query, expected["blk.1.attn_q.weight"].T)
    c = model.config
    assert (c.vocab_size, c.groups, c.rms_norm_eps, c.rope_theta) == (17, 2, 1e-5, 500.0)
    assert c.tie_word_embeddings and not c.attention_bias


def test_a_saved_folder_is_the_same_model(folder):
    model = load(folder)
    back = load(save(model, folder / "saved"))
    assert back.config == model.config
    for path, leaf in tree.flatten(model.variables).items():
        np.testing.assert_array_equal(tree.flatten(back.variables)[path], leaf)


def test_qwen_keeps_its_rows(tmp_path):
    arrays = tensors(np.random.default_rng(0))
    write(tmp_path / "tiny.gguf", arrays, kind="qwen3")
    raw = {name: gguf.dequantize(gguf.quantize(llama_cpp(name, arrays[name]), Q4_1), Q4_1)
           for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight")}  # fmt: skip
    found = read_gguf(tmp_path / "tiny.gguf")
    for name, array in raw.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 1.0])
def test_a_cut_file(folder, share):
    """Down to the loss of a single byte: the last tensor ends within the 32 bytes that files are padded to."""
    file = folder / "tiny.gguf"
    content = file.read_bytes()
    last = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(file).tensors)
    file.write_bytes(content[: min(int(share * len(content)), last - 1)])
    with pytest.raises(FormatError, match="is not a complete GGUF file.*fetch it again"):
        load(folder)


def test_foreign_files(folder):
    (folder / "tiny.gguf").write_bytes(b"PK\3\4" + bytes(200))
    with pytest.raises(FormatError, match="is not a complete GGUF file"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="No weight file"):
        read_gguf(folder / "none.gguf")
    (folder / "other.gguf").write_bytes(b"")
    with pytest.raises(FormatError, match="several GGUF files, .*'other.gguf', 'tiny.gguf'"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gemma", {}, "architecture 'gemma'; GGUF files of llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, r"settings \['expert_count'\] of llama are not supported"),
        ("llama", {"rope.dimension_count": 8}, "rope.dimension_count is not 16, the size of a head"),
        ("llama", {"rope.scaling.type": "yarn"}, "rope_type='yarn' is not supported"),
    ],
)
def test_settings_that_are_not_computed(tmp_path, kind, more, message):
    write(tmp_path / "tiny.gguf", {}, kind, **more)
    with pytest.raises(ValueError, match=message):
        scratch(tmp_path, key=jax.random.key(0))


def test_tensors_that_are_not_used(tmp_path):
    arrays = tensors(np.random.default_rng(0)) | {"rope_freqs.weight": np.ones(8, np.float32)}
    write(tmp_path / "tiny.gguf", arrays)
    with pytest.raises(WeightsError, match="1 tensors that the model does not use: rope_freqs.weight"):
        load(tmp_path)


def test_a_tokenizer_of_another_kind(folder):
    with pytest.raises(FormatError, match="splits as smollm, found None, None: take the tokenizer from"):
        tokenizer(folder)


# --- SmolLM2 -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_whole_and_knows_paris():
    model, report = load_with_report("smollm2")
    assert len(report.used) == 272 and report.ignored == report.new == ()
    assert tree.size(model.params) == 134_515_008
    words = tokenizer("smollm2")
    ids = words("The capital of France is")["input_ids"]
    logits = jax.jit(lambda m, b: m(b)["token_logits"])(model, {"input_ids": np.array([ids], np.int32)})
    assert words.decode([int(jnp.argmax(logits[0, -1]))]) == " Paris"


def test_tokenizer_of_smollm2():
    words = tokenizer("smollm2")
    text = "In 2024, caf\u00e9s sold 1234 cups.\n\n  Really?<|im_end|>"
    ids = words(text)["input_ids"]
    assert words.decode(ids) == text and ids[-1] == words.eos_token_id == words.pad_token_id == 2
    assert [words.decode([i]) for i in ids[1:6]] == [" ", "2", "0", "2", "4"]  # digits stand alone
    chat = words.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful") and chat.endswith("Hi<|im_end|>\n")
    assert len(words) == 49152 and words.model_max_length == 8192


@pytest.mark.parity
def test_smollm2_is_what_transformers_reads(tmp_path):
    """Weights and tokens of its own reader, which needs torch; a saved folder gives the same logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve("smollm2")
    name = next(where.glob("*.gguf")).name
    theirs = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    model, _ = load_with_report("smollm2")
    folder = save(model, tmp_path / "saved", tokenizer="smollm2")
    for key, array in read_tensors(folder).items():
        np.testing.assert_array_equal(array, state[key], err_msg=key)
    back, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = "Gravity is the force by which a planet or other body draws objects toward its centre. In 1687 ..."
    words = AutoTokenizer.from_pretrained(folder)
    ids = words(text)["input_ids"]
    # Its reader does not know how this vocabulary splits digits; on this text it is the same.
    assert ids == tokenizer("smollm2")(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(where, gguf_file=name)(text)["input_ids"]
    with torch.no_grad():
        first, second = (m(torch.tensor([ids])).logits.numpy() for m in (theirs, back.eval()))
    np.testing.assert_array_equal(first, second)
    found = jax.jit(lambda m, b: m(b)["token_logits"])(model, {"input_ids": np.array([ids], np.int32)})
    assert np.abs(np.asarray(found) - first).max() / np.abs(first).max() < 1e-4
    assert settings(where / name)["rope_theta"] == back.config.rope_parameters["rope_theta"]
