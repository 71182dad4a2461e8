"""The part of `random_models` that is about sound: settings, batches and outputs of Whisper, Wav2Vec2 and HuBERT."""

import numpy as np

CTC = ("wav2vec2", "hubert")
SPEECH = ("whisper", *CTC)


def settings(name, common, rng, small):
    """Random settings under the names of the model's config class; `common` are those of a transformer encoder."""
    width, layers = common["hidden_size"], common["num_hidden_layers"]
    if name == "whisper":
        return dict(vocab_size=23, num_mel_bins=5, d_model=2 * width, encoder_layers=layers,
                    decoder_layers=2 if small else int(rng.integers(1, 4)),
                    encoder_attention_heads=common["num_attention_heads"],
                    decoder_attention_heads=common["num_attention_heads"], encoder_ffn_dim=7, decoder_ffn_dim=9,
                    activation_function=common["hidden_act"], max_source_positions=int(rng.integers(4, 8)),
                    max_target_positions=11, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                    )  # fmt: skip
    groups = int(rng.choice([1, common["num_attention_heads"]]))
    stable = bool(rng.random() < 0.5) if not small else name == "hubert"
    return common | dict(
        vocab_size=13, intermediate_size=int(rng.integers(5, 16)), conv_dim=(6, 5, 4), conv_kernel=(5, 3, 2),
        conv_stride=(3, 2, 2), num_feat_extract_layers=3, conv_bias=bool(rng.random() < 0.5),
        feat_extract_norm="layer" if stable else str(rng.choice(["group", "layer"]) if not small else "group"),
        feat_extract_activation=str(rng.choice(["gelu", "relu"])), do_stable_layer_norm=stable,
        num_conv_pos_embeddings=int(rng.choice([4, 5])), num_conv_pos_embedding_groups=groups,
        layer_norm_eps=float(rng.choice([1e-5, 1e-3])), mask_time_prob=float(rng.choice([0.0, 0.05])),
    )  # fmt: skip


def build(name, config):
    """The torch model, with its head, which must be asked for: these have no one class of a task."""
    import transformers

    kind = {
        "whisper": transformers.WhisperForConditionalGeneration,
        "wav2vec2": transformers.Wav2Vec2ForCTC,
        "hubert": transformers.HubertForCTC,
    }[name]
    return kind(config).eval()


def batch(name, config, rng, padded):
    """Random spectrograms and texts, or waveforms, some shorter than others if `padded`."""
    B, L = 3, int(rng.integers(4, 10))
    lengths = rng.integers(1, L + 1, (B, 1))
    if name == "whisper":
        frames = 2 * config["max_source_positions"]
        mask = {"decoder_attention_mask": (np.arange(L) < lengths).astype(np.int32)}
        return {
            "log_mel": rng.normal(size=(B, frames, config["num_mel_bins"])).astype(np.float32),
            "decoder_input_ids": rng.integers(3, 23, (B, L)).astype(np.int32),
        } | (mask if padded else {})
    N = 20 * L
    audio, real = (
        rng.normal(size=(B, N)).astype(np.float32),
        np.arange(N) < 20 * lengths + rng.integers(7, 20),
    )
    if not padded:
        return {"audio": audio}
    return {"audio": np.where(real, audio, 0).astype(np.float32), "attention_mask": real.astype(np.int32)}


def run(name, model, inputs):
    """Outputs by our names, and hidden states by path."""
    import torch

    kwargs = {key: torch.tensor(value) for key, value in inputs.items()}
    kwargs |= {key: value.long() for key, value in kwargs.items() if not value.is_floating_point()}
    if name == "whisper":
        kwargs["input_features"] = kwargs.pop("log_mel").transpose(1, 2)
    else:
        kwargs["input_values"] = kwargs.pop("audio")
    with torch.no_grad():
        out = model(**kwargs, output_hidden_states=True)
    outputs = {"token_logits": out.logits.numpy()}
    if name != "whisper":
        outputs |= {f"encoder/layer_{i}": state.numpy() for i, state in enumerate(out.hidden_states[1:])}
        with torch.no_grad():  # the last norm is in none of these
            return outputs | {"sequence": getattr(model, name)(**kwargs).last_hidden_state.numpy()}
    for side in ("encoder", "decoder"):
        states = [state.numpy() for state in out[f"{side}_hidden_states"]]
        outputs |= {f"{side}/embeddings": states[0], ("encoded", "sequence")[side == "decoder"]: states[-1]}
        outputs |= {f"{side}/layer_{i}": state for i, state in enumerate(states[1:-1])}
    return outputs
