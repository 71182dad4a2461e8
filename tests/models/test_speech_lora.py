"""LoRA on Whisper and Wav2Vec2: its files open in PEFT, with equal outputs."""

import jax
import numpy as np
import pytest
from references import read
from support import error, from_files

from experiments.models.random_models import run
from experiments.models.speech_models import SPEECH
from jtl import adapters, tree
from jtl.pretrained import save


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers
@pytest.mark.parametrize("name", SPEECH)
def test_peft_opens_what_is_saved(name, tmp_path, key):
    import transformers
    from peft import PeftModel

    config, weights, inputs, _ = read(name)
    model = from_files(name, config, weights)
    adapted = adapters.lora(model, rank=2, where=".*/(query|value)", key=key)
    moved = {path: leaf + 0.05 * ("/lora/" in path) for path, leaf in tree.flatten(adapted.params).items()}
    adapted = adapted.with_params(tree.nest(moved))
    adapters.peft.save(adapted, tmp_path / "adapter")
    kind = transformers.AutoModelForSpeechSeq2Seq if name == "whisper" else transformers.AutoModelForCTC
    base = kind.from_pretrained(save(model, tmp_path / "base"))
    theirs = run(name, PeftModel.from_pretrained(base, tmp_path / "adapter").eval().base_model.model, inputs)
    ours = jax.jit(lambda model: model(inputs))(adapted)
    real = inputs["decoder_attention_mask"] if name == "whisper" else np.asarray(ours["sequence_mask"])
    found, expected, before = (
        np.asarray(out["token_logits"]) * real[..., None] for out in (ours, theirs, model(inputs))
    )
    assert error(found, expected) < 1e-4 and error(before, expected) > 1e-3
