"""The application of speech recognition: a short real run, its adapter used again, and rates of a hand-made case."""

import csv
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.io import wavfile

from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.study import predict, run
from experiments.speech_recognition.training import error_rates
from experiments.speech_recognition.transcribers import transcriber
from jtl import pretrained
from jtl.data.readers import sound
from jtl.data.sets import espeak

TEXTS = ("One.", "Two and three.", "Four.", "Five and six.", "Seven.", "Eight.")
WHISPER = {
    "model_type": "whisper", "vocab_size": 51865, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "decoder_start_token_id": 50258, "bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257,
}  # fmt: skip
WAV2VEC2 = {
    "model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "vocab_size": 7, "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def whisper(tmp_path):
    """A small Whisper of random weights with the real tokenizer, and a folder of speech for each split."""
    (tmp_path / "config.json").write_text(json.dumps(WHISPER))
    model = pretrained.scratch(tmp_path, key=jax.random.key(0))
    pretrained.save(model, tmp_path / "model", tokenizer="whisper-base")
    clips = espeak.synthesise(TEXTS)
    for split in ("train", "validation", "test"):
        (tmp_path / "own" / split).mkdir(parents=True)
        with (tmp_path / "own" / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("file_name", "text"), *((f"{i}.wav", t) for i, t in enumerate(TEXTS))]
            )
        for i, clip in enumerate(clips):
            wavfile.write(tmp_path / "own" / split / f"{i}.wav", sound.RATE, clip)
    return SpeechRecognition(
        out=tmp_path / "run", quick=True, model=str(tmp_path / "model"), data=str(tmp_path / "own")
    )


@pytest.mark.slow
def test_speech_recognition(whisper, capsys):
    """Of a network whose weights are random: what it learns is not asked."""
    found = run(whisper).summary
    assert set(found["wer"]) == set(found["cer"]) == {"before", "transfer", "scratch"}
    assert "Before and after" in (whisper.out / "report.md").read_text()
    assert sound.read(whisper.out / "sounds" / "test_0.wav").any()
    written = json.loads((whisper.out / "written.json").read_text())
    assert len(written) == 2 and set(written[0]) == {"text", "voice", "before", "transfer", "scratch"}

    assert predict(replace(whisper, predict=whisper.out / "sounds")) is None
    said = json.loads((whisper.out / "predictions.json").read_text())
    assert [row["text"] for row in said] == [
        row["transfer"] for row in written
    ]  # the adapter that was stored
    assert "2 clips transcribed" in capsys.readouterr().out


def test_rates_of_a_hand_made_case():
    said = ["The cat sat.", "On the mat"]
    assert error_rates(said, ["the cat sat", "on the mat!"]) == {"wer": 0, "cer": 0}
    found = error_rates(
        said, ["The cat sad", "the mat"]
    )  # a letter of 21, spaces too; then a word of two letters and a space
    assert found["wer"] == pytest.approx(2 / 6) and found["cer"] == pytest.approx(4 / 21)


@pytest.mark.slow
def test_letters_of_a_ctc_model(tmp_path):
    from transformers import Wav2Vec2CTCTokenizer

    letters = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(WAV2VEC2))
    model = pretrained.scratch(tmp_path, key=jax.random.key(0))
    ears = transcriber(str(tmp_path), model, "en")
    clips = [np.sin(np.arange(n) / 9).astype(np.float32) for n in (4000, 6000, 5000)]
    rows = ears.rows(
        [{"audio": clip, "text": text} for clip, text in zip(clips, ("ab b", "ba", "a"), strict=True)]
    )
    batch = rows.batch(np.arange(3))
    assert batch["labels"].tolist() == [[5, 6, 4, 6], [6, 5, -1, -1], [5, -1, -1, -1]]
    value, metrics = ears.loss.value(model, model(batch), batch, None)
    assert np.isfinite(value) and metrics["labels"] == 7
    written = ears.write(model, clips)
    assert len(written) == 3 and set("".join(written)) <= set("AB <unk>/s")


def test_refused(tmp_path, whisper):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(SpeechRecognition(out=tmp_path, predict=tmp_path / "new.wav"))
    with pytest.raises(ValueError, match="--rank must be at least 1"):
        run(SpeechRecognition(out=tmp_path, rank=0))
    bert = pretrained.load("minilm")
    with pytest.raises(ValueError, match="--model minilm: expected a Whisper, or a Wav2Vec2 or HuBERT"):
        transcriber("minilm", bert, "en")
