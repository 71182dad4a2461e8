"""The application of music: bits of an event by hand, a short real run, its model used again, refusals."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from experiments.music.config import Music
from experiments.music.study import predict, run
from experiments.music.tokens import PITCH, SIZE, Whole, encode
from experiments.music.training import Trainer, bits_per_event
from jtl.data import midi
from jtl.data.readers.midi import Piece

pytest.importorskip("music21")


def test_bits_of_an_event():
    """A model that thinks each token as likely as any other, but for C4, which it thinks twice as likely."""

    def say(params, input_ids):
        return {"token_logits": jnp.broadcast_to(params["logits"], (*input_ids.shape, SIZE))}

    logits = jnp.zeros(SIZE).at[PITCH + 60].set(jnp.log(2.0))
    model = jtl.wrap.function(say, {"logits": logits})
    notes = np.array([[0, 4 * i, 4, 60 + i % 3] for i in range(50)], np.int32)
    pieces = [Piece("one", 16, 0, 1, notes), Piece("two", 12, 4, 1, notes[:10])]
    targets = np.concatenate([encode(one)[3:] for one in pieces])
    total = len(targets) * np.log2(SIZE + 1) - (targets == PITCH + 60).sum()
    for length in (16, 32, 128):
        assert bits_per_event(model, Whole(pieces, length)) == pytest.approx(total / 60, rel=1e-5)


def test_a_folder_of_your_own(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        pitches = np.stack(
            [70 + rng.integers(-4, 5, 20).cumsum() % 12, 50 + rng.integers(-4, 5, 20).cumsum() % 12]
        )
        notes = [[voice, 4 * at, 4, int(pitches[voice, at])] for at in range(20) for voice in range(2)]
        midi.write(tmp_path / f"{i}.mid", Piece("", 12, 0, 2, np.array(notes, np.int32)))
    trainer = Trainer(Music(out=tmp_path / "run", data=str(tmp_path), voices=2, train_pieces=2))
    assert {name: len(own) for name, own in trainer.splits.items()} == {
        "train": 5,
        "validation": 1,
        "test": 2,
    }
    assert trainer.names == ("voice 1", "voice 2") and trainer.bar == 12 and len(trainer.few(0)) == 2
    (top_low, top_high), (low, high) = trainer.ranges
    assert 70 <= top_low < top_high <= 81 and 50 <= low < high <= 61
    found = trainer.described(trainer.few(0), 0)
    assert found["in_range"] == found["all_voices"] == found["copied"] == 1 and found["crossing"] == 0
    assert trainer.described((), 0) == {}


@pytest.mark.slow
def test_music(tmp_path, capsys):
    """In so few updates nothing is learned; what is written must still be music."""
    config = Music(
        out=tmp_path / "run", quick=True, pretraining_updates=6, updates=4, samples=2, train_pieces=4
    )
    summary = run(config).summary
    assert set(summary["bits_per_event"]) == {"before", "transfer", "scratch"}
    assert summary["in_range"]["real"]["mean"] > 0.95 and summary["in_key"]["real"]["mean"] > 0.9
    report = (config.out / "report.md").read_text()
    assert "Samples of transfer" in report and "--quick" in report
    for ending in ("mid", "wav", "png", "json"):
        assert list((config.out / "samples").glob(f"transfer*.{ending}")), ending
    rows = json.loads((config.out / "result.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["pretraining", "real", "before", "transfer", "scratch"]

    capsys.readouterr()
    assert predict(replace(config, predict=1)) is None
    assert "notes" in capsys.readouterr().out
    assert {file.suffix for file in (config.out / "new").iterdir()} == {".mid", ".wav", ".png"}
    again = run(replace(config, resume=True))
    assert [row["seconds"] for row in again.rows] == [row["seconds"] for row in rows]  # from rows.jsonl


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none: run without --predict first"):
        predict(Music(out=tmp_path, predict=1))
    with pytest.raises(ValueError, match="--samples must be at least 1"):
        run(Music(out=tmp_path, samples=0))
    with pytest.raises(FileNotFoundError, match="no folder at"):
        run(Music(out=tmp_path / "run", data=str(tmp_path / "nowhere")))
