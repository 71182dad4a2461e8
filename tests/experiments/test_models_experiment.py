"""The models from the command line, as a user calls them; and the check against transformers."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile
from sklearn.datasets import load_sample_image

import jtl
from experiments.models import check, compare, random_models
from experiments.models.check import Check, failures, run
from experiments.models.commands import class_names, main, paper
from jtl.data.encode import spectrograms
from jtl.data.readers import sound
from jtl.models import ARCHITECTURES
from jtl.models.imagenet import imagenet_classes
from jtl.pretrained import SHORT_NAMES, save, scratch, tokenizer
from jtl.report import read_result
from jtl.tasks import generate, transcribe

LLAMA = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "initializer_range": 0.5,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 49152, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0, "initializer_factor": 8.0,
}  # fmt: skip
WHISPER = {
    "model_type": "whisper", "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "init_std": 0.5,
    "decoder_start_token_id": 50258, "eos_token_id": 50257, "bos_token_id": 50257, "pad_token_id": 50257,
    "suppress_tokens": [1], "begin_suppress_tokens": [220, 50257],
}  # fmt: skip


def small(folder, settings, words):
    """A folder with a small random model that has the tokenizer of a real one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return str(save(scratch(folder, key=jax.random.key(0)), folder / "model", tokenizer=words))


def said(capsys, *words):
    """What a command prints."""
    main(words)
    return capsys.readouterr().out.strip()


def test_list_has_every_architecture_and_short_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = said(capsys, "list")
    for name in (*ARCHITECTURES, *SHORT_NAMES):
        assert f" {name} " in text, name
    assert "Whisper" in text and "log_mel decoder_input_ids" in text and "arXiv 1810.04805" in text


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("bert", "1810.04805"),
        ("llama", "2307.09288"),
        ("mistral", "2310.06825"),
        ("qwen2", "2407.10671"),
        ("qwen3", "2505.09388"),
        ("wav2vec2", "2006.11477"),
        ("hubert", "2106.07447"),
        ("convnext", "2201.03545"),
        ("convnextv2", "2301.00808"),
    ],
)
def test_papers_are_found_behind_their_names(name, link):
    assert paper(ARCHITECTURES[name]) == f"arXiv {link}"


def test_every_architecture_has_a_paper():
    assert all(len(paper(architecture)) > 10 for architecture in ARCHITECTURES.values())


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "raw"), [(LLAMA, False), (LLAMA, True), (T5, True)])
def test_generate(tmp_path, capsys, settings, raw):
    folder = small(tmp_path / "small", settings, "smollm2")
    words, model = tokenizer(folder), jtl.load(folder)
    said_by_a_user = [{"role": "user", "content": "Hi"}]
    chat = words.apply_chat_template(said_by_a_user, tokenize=False, add_generation_prompt=True)
    assert "assistant" in chat
    ids = np.array([words("Hi" if raw else chat)["input_ids"]], np.int32)

    def expected(**more):
        texts = {"input_ids": None, "encoder": {"input_ids": ids}} if settings is T5 else {"input_ids": ids}
        new = generate(model, **texts, max_new_tokens=5, eos_id=2, **more)[0]
        return words.decode(new, skip_special_tokens=True)

    flags = ["generate", "Hi", "--model", folder, "--max-new-tokens", "5", *(["--raw"] if raw else [])]
    assert said(capsys, *flags) == expected().strip()
    drawn = said(capsys, *flags, "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed", "3")
    assert drawn == expected(temperature=2.0, top_k=50, top_p=0.9, key=jax.random.key(3)).strip()


def test_transcribe_hears_any_rate(tmp_path, capsys):
    folder = small(tmp_path / "whisper", WHISPER, "whisper-base")
    words, model = tokenizer(folder), jtl.load(folder)
    wave = np.random.default_rng(0).normal(size=22050).clip(-1, 1).astype(np.float32)
    wavfile.write(tmp_path / "sound.wav", 22050, wave)
    sounds = spectrograms.log_mel(sound.resample(wave, 22050))[None]
    flags = ["transcribe", str(tmp_path / "sound.wav"), "--model", folder]
    (expected,) = transcribe(model, words, sounds, language="en")
    assert said(capsys, *flags, "--language", "en") == expected.text
    (timed,) = transcribe(model, words, sounds, language="en", task="translate", timestamps=True)
    lines = said(capsys, *flags, "--language", "en", "--task", "translate", "--timestamps").splitlines()
    assert len(lines) == len(timed.segments) and lines[0].split()[0] == f"{timed.segments[0].start:.2f}"


def test_classify_names_a_photograph(tmp_path, capsys):
    Image.fromarray(load_sample_image("flower.jpg")).save(tmp_path / "flower.png")
    lines = said(capsys, "classify", str(tmp_path / "flower.png"), "--top", "3").splitlines()
    assert len(lines) == 3 and lines[0].split() == [lines[0][:5], "daisy"]
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and 0.05 < shares[0] < 1


def test_names_of_classes(tmp_path):
    def names(labels, classes):
        settings = {"model_type": "vit"} | ({"id2label": labels} if labels else {})
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return class_names(str(tmp_path), classes)

    assert names({"0": "cat", "1": "dog"}, 2) == ["cat", "dog"]
    assert names({"0": "LABEL_0", "1": "LABEL_1"}, 2) == ["class 0", "class 1"]
    assert names(None, 1000) == imagenet_classes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "Hi", "--model", "efficientnet-lite0"], "a model is needed that reads input_ids"),
        (["generate", "Hi", "--model", "minilm"], "generate needs a causal model"),
        (["generate", "Hi", "--model", "smol"], "Did you mean 'smollm2'"),
        (["classify", "none.png"], "No such file or directory: 'none.png'"),
        (["classify", "none.png", "--model", "minilm"], "needed that reads image"),
        (["classify", "none.png", "--top", "0"], "--top must be at least 1"),
        (["transcribe", "none.wav"], "No such file"),
        (["check", "--out", "x", "--architectures", "brt"], "Near misses: bert"),
        (["check", "--out", "x", "--architectures", "efficientnet_lite"], "transformers does not have it"),
        (["check", "--out", "x", "--draws", "0"], "--draws must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words, message, capsys, monkeypatch):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_bare_encoder_does_not_classify(tmp_path, capsys):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes})
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    folder = save(scratch(tmp_path, key=jax.random.key(0)), tmp_path / "model", tokenizer=tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "black.png")
    with pytest.raises(SystemExit):
        main(["classify", str(tmp_path / "black.png"), "--model", str(folder)])
    assert "has no classification head: fine-tune it" in capsys.readouterr().err


# --- check -------------------------------------------------------------------------------------------


def test_check_without_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torch here: install the extra, pip install '\.\[parity\]'"):
        run(Check(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_every_architecture_of_transformers_is_drawn():
    import transformers

    there = {name for name, own in ARCHITECTURES.items() if hasattr(transformers, own.base_class)}
    assert there == set(random_models.NAMES)


def test_padding_does_not_count():
    value = np.ones((2, 3, 4))
    inputs = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    assert compare.at_real("sequence", value, inputs).sum(-1).tolist() == [[4, 4, 0], [4, 0, 0]]
    assert compare.at_real("pooled", value[0], inputs).sum() == 12
    both = inputs | {"decoder_input_ids": value, "decoder_attention_mask": np.array([[1, 0, 0], [1, 1, 1]])}
    assert compare.at_real("sequence", value, both).sum(-1).tolist() == [[4, 0, 0], [4, 4, 4]]
    assert compare.at_real("encoded", value, both).sum(-1).tolist() == [[4, 4, 0], [4, 0, 0]]
    assert compare.at_real("sequence", value, both, np.zeros((2, 3))).sum() == 0


@pytest.mark.parity
def test_check(tmp_path, monkeypatch, capsys):
    names = ("bert", "vit", "wav2vec2")
    main(["check", "--out", str(tmp_path), "--quick", "--architectures", *names])
    assert "vit" in capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    errors = found["summary"]["relative_error"]
    assert tuple(errors) == names and all(0 < own["mean"] < 1e-5 for own in errors.values())
    assert 0 < found["summary"]["relative_error_weights"]["minilm"]["mean"] < 1e-5
    text = (tmp_path / "report.md").read_text()
    assert "Every relative error is at most 0.0001" in text
    assert "| efficientnet_lite | transformers does not" in text
    assert "python -m experiments.models check --out" in text

    # A model that computes something else is found, by its output, and the command ends with 1.
    real = random_models.run
    monkeypatch.setattr(
        random_models, "run", lambda *a: {k: v * (1 + (k == "pooled") * 0.01) for k, v in real(*a).items()}
    )
    flags = ["--quick", "--architectures", "bert", "--weights", "minilm"]
    with pytest.raises(SystemExit) as stop:
        main(["check", "--out", str(tmp_path / "wrong"), *flags])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "bert, configuration 0: pooled differs by" in error and "minilm: pooled differs by" in error
    wrong = read_result(tmp_path / "wrong")
    assert len(failures(wrong.rows, 1e-4)) == 2 and failures(read_result(tmp_path).rows, 1e-4) == []


@pytest.mark.slow
def test_real_models_answer(tmp_path, capsys):
    from jtl.data.sets import espeak

    assert "Paris" in said(capsys, "generate", "What is the capital of France?", "--max-new-tokens", "12")
    (clip,) = espeak.synthesise([check.SENTENCES[5]], "en-us+f2", rate=22050)
    wavfile.write(tmp_path / "sound.wav", 22050, clip)
    found = said(capsys, "transcribe", str(tmp_path / "sound.wav"), "--language", "en")
    assert check.plain([found]) == check.plain([check.SENTENCES[5]])
    row = check.word_errors("whisper-base", "en-us")
    assert row["wer"] < 0.1 and len(row["written"]) == 6
