"""A small Wav2Vec2 learns words of synthesised speech by CTC, from nothing but their spelling."""

import jax
import numpy as np
import optax
import pytest

from jtl import train
from jtl.data.encode import spectrograms
from jtl.data.sets import espeak
from jtl.model import linen
from jtl.models.wav2vec2 import Wav2Vec2
from jtl.models.wav2vec2_config import Wav2Vec2Config
from jtl.tasks import CTC, ctc

WORDS = ["yes", "no", "left", "right", "stop", "go"]
LETTERS = "-" + "".join(sorted(set("".join(WORDS))))


@pytest.mark.slow
def test_words_are_learnt(key):
    """Heard in seven voices and tested in an eighth; untrained it spells none, trained most."""
    config = Wav2Vec2Config(
        vocab_size=len(LETTERS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        conv_dim=(32, 64, 64, 64), conv_kernel=(10, 4, 4, 4), conv_stride=(8, 4, 4, 3), feat_extract_norm="layer",
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, ctc=True,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip

    def heard(voice):
        return spectrograms.waveforms(espeak.synthesise(WORDS, voice), 16000)

    voices = [heard(f"en{rest}") for rest in ("-us", "-us+m1", "-us+m3", "-us+f2", "-us+f3", "", "+f4")]
    spelt = np.full((len(WORDS), max(map(len, WORDS))), -1)
    for row, word in zip(spelt, WORDS, strict=True):
        row[: len(word)] = [LETTERS.index(letter) for letter in word]
    batch = {name: np.concatenate([voice[name] for voice in voices]) for name in voices[0]}
    batch["labels"] = np.tile(spelt, (len(voices), 1))
    module = Wav2Vec2(config)
    model = linen(module, jax.jit(module.init)(key, batch["audio"][:1])).replace(config=config)

    def spelling(model):
        out = model(heard("en-us+m5"))
        return [
            "".join(LETTERS[i] for i in row) for row in ctc.decode(out["token_logits"], out["sequence_mask"])
        ]

    assert not set(spelling(model)) & set(WORDS)
    rate = optax.warmup_constant_schedule(0.0, 3e-3, 30)
    step = train.make_step(CTC(), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))
    state = step.init(model, key)
    for _ in range(150):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.1
    right = [found == word for found, word in zip(spelling(state.model), WORDS, strict=True)]
    assert sum(right) >= 4, spelling(state.model)
