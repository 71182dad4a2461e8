"""Small random models of `transformers`, inputs for them, and their outputs under jtl's names.

The oracle of the tests of architectures and of `python -m experiments.models check`. A new architecture joins with its
`settings` and its name in one of the tuples. Building and running a model needs torch (the `parity` extra).
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from experiments.models import speech_models, vision_models
from experiments.models.speech_models import SPEECH
from experiments.models.vision_models import CONVOLUTIONAL

TEXT = ("bert", "roberta", "distilbert")
IMAGE = ("vit", "deit", "dinov2", "dinov2_with_registers")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
CAUSAL = (*DECODERS, "gpt2")
SEQ2SEQ = ("t5",)
NAMES = (*TEXT, *IMAGE, *CAUSAL, *SEQ2SEQ, *SPEECH, *CONVOLUTIONAL, "clip")  # all of them
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh")


def settings(name, rng, small=False):
    """Random settings under the names of the model's config class."""
    heads, per_head = int(rng.choice([1, 2, 3, 5])), int(rng.choice([2, 4, 5]))
    layers, act = int(rng.integers(1, 4)), str(rng.choice(ACTIVATIONS))
    if small:
        heads, per_head, layers, act = 3, 2, 2, "gelu"
    width, inner = heads * per_head, int(rng.integers(5, 16))
    if name in DECODERS:
        return decoder_settings(name, rng, small) | dict(num_hidden_layers=layers, intermediate_size=inner)
    if name in CONVOLUTIONAL:
        return vision_models.settings(name, rng, act, small)
    if name == "clip":
        return vision_models.clip_settings(rng, act, small)
    if name == "gpt2":
        return dict(vocab_size=23, n_positions=19, n_embd=width, n_layer=layers, n_head=heads, n_inner=inner,
                    activation_function=act, layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
                    scale_attn_weights=bool(rng.random() < 0.5), bos_token_id=1, eos_token_id=2,
                    scale_attn_by_inverse_layer_idx=bool(rng.random() < 0.5),
                    tie_word_embeddings=bool(small or rng.random() < 0.5))  # fmt: skip
    if name == "t5":
        return dict(vocab_size=23, d_model=2 * width, d_kv=per_head, d_ff=inner, num_layers=layers, num_heads=heads,
                    num_decoder_layers=2 if small else int(rng.integers(1, 4)),
                    relative_attention_num_buckets=int(rng.choice([4, 6, 8])),
                    relative_attention_max_distance=int(rng.choice([5, 7, 12])),
                    feed_forward_proj="gated-gelu" if small else str(rng.choice(["relu", "gated-gelu", "gated-silu"])),
                    tie_word_embeddings=bool(not small and rng.random() < 0.5), decoder_start_token_id=0)  # fmt: skip
    if name == "distilbert":
        return dict(vocab_size=23, max_position_embeddings=17, dim=width, n_layers=layers, n_heads=heads,
                    hidden_dim=inner, activation=act)  # fmt: skip
    common = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act)
    if name in SPEECH:
        return speech_models.settings(name, common, rng, small)
    epsilon = dict(layer_norm_eps=float(rng.choice([1e-12, 1e-6, 1e-3])))
    if name in TEXT:
        return common | epsilon | dict(vocab_size=23, max_position_embeddings=17, intermediate_size=inner,
                                       type_vocab_size=2)  # fmt: skip
    patch = int(rng.choice([2, 3]))
    image = dict(
        patch_size=patch, image_size=patch * int(rng.integers(3, 6)), num_channels=int(rng.choice([1, 3]))
    )
    common |= epsilon | image | dict(qkv_bias=bool(rng.random() < 0.5))
    if name.startswith("dinov2"):
        return common | dict(mlp_ratio=2, use_swiglu_ffn=bool(rng.random() < 0.5))
    return common | dict(
        intermediate_size=inner, pooler_output_size=7, pooler_act=str(rng.choice(["tanh", "relu"]))
    )


def decoder_settings(name, rng, small):
    """Those of a decoder: grouped heads, a scaling of rotary positions, a window where there can be one."""
    groups, repeats, per_head = (int(rng.choice(n)) for n in ([1, 2], [1, 3], [2, 4, 6]))
    scaling = ROPE[name if small else str(rng.choice(list(ROPE)))]
    if small:
        groups, repeats, per_head = 2, 2, 4
    config = dict(vocab_size=23, hidden_size=groups * repeats * per_head, num_attention_heads=groups * repeats,
                  num_key_value_heads=groups, max_position_embeddings=40, rope_theta=50.0, rope_scaling=scaling,
                  tie_word_embeddings=bool(small or rng.random() < 0.5), rms_norm_eps=1e-5)  # fmt: skip
    if name in ("llama", "qwen3"):
        config["attention_bias"] = bool(rng.random() < 0.5)
        config["head_dim"] = 2 * per_head
    if name == "llama":
        config["mlp_bias"] = bool(rng.random() < 0.5)
    if name == "mistral":
        config["sliding_window"] = 3
    if name.startswith("qwen"):
        config |= dict(
            use_sliding_window=small or bool(rng.random() < 0.5), sliding_window=3, max_window_layers=1
        )
    return config


LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE = {
    "llama": LLAMA3 | dict(original_max_position_embeddings=16),
    "mistral": None,
    "qwen2": dict(rope_type="linear", factor=2.0),
    "qwen3": None,
}


def build(name, config):
    """The torch model of these settings, with random weights of a size that matters; a decoder with its last layer."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(name, **config)
    if name in SPEECH:
        model = speech_models.build(name, config)
    elif name in SEQ2SEQ:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        if (
            not config.scale_decoder_outputs
        ):  # T5 1.1, whose last layer is not tied, which no configuration says
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        kind = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
        model = kind.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            scale = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            value.copy_(scale + 0.4 * torch.randn(value.shape, generator=generator))
            if key.endswith("running_var"):
                value.copy_(0.5 + value**2)
    return model


def files(model):
    """What `save_pretrained` writes: config.json as a dict, and the tensors by key."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def batch(name, config, rng, padded=True):
    """Random inputs: texts of unequal length, or images whose size is not the native one."""
    if name in SPEECH:
        return speech_models.batch(name, config, rng, padded)
    if name in CONVOLUTIONAL:
        return vision_models.batch(name, config, rng)
    if name == "clip":
        return vision_models.clip_batch(config, rng, padded)
    if name in IMAGE:
        patch, native = config["patch_size"], config["image_size"]
        size = [native, native] if not padded else [patch * int(rng.integers(2, 8)) for _ in range(2)]
        return {"image": rng.normal(size=(2, *size, config["num_channels"])).astype(np.float32)}
    B, L = 3, int(rng.integers(4, 10))
    inputs = {"input_ids": rng.integers(3, 23, (B, L)).astype(np.int32)}
    if name in SEQ2SEQ:
        N = int(rng.integers(3, 8))
        inputs["decoder_input_ids"] = rng.integers(3, 23, (B, N)).astype(np.int32)
        masks = {
            "attention_mask": np.ones((B, L), np.int32),
            "decoder_attention_mask": np.ones((B, N), np.int32),
        }
        for mask in masks.values():
            mask[0, -2:] = mask[1, :2] = 0
        return inputs | (masks if padded else {})
    if name in CAUSAL:
        mask = np.ones((B, L), np.int32)
        mask[0, -2:] = mask[1, :2] = 0  # padding on the right, on the left, and none
        return inputs | ({"attention_mask": mask} if padded else {})
    if padded:
        mask = (np.arange(L) < rng.integers(1, L + 1, (B, 1))).astype(np.int32)
        pad = config.get("pad_token_id", 0)
        inputs |= {
            "input_ids": np.where(mask, inputs["input_ids"], pad).astype(np.int32),
            "attention_mask": mask,
        }
        if name != "distilbert":
            inputs["token_type_ids"] = rng.integers(0, 2, (B, L)).astype(np.int32)
    return inputs


def run(name, model, inputs):
    """Outputs by our names: `sequence`, `pooled` or `pooler` where torch has one, and every hidden state."""
    import torch

    if name in SPEECH:
        return speech_models.run(name, model, inputs)
    if name in CONVOLUTIONAL:
        return vision_models.run(name, model, inputs)
    if name == "clip":
        return vision_models.clip_run(model, inputs)
    if name in IMAGE:
        kwargs = {"pixel_values": torch.tensor(inputs["image"].transpose(0, 3, 1, 2))}
        kwargs |= {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    else:
        kwargs = {key: torch.tensor(value).long() for key, value in inputs.items()}
    if name == "gpt2":  # its generate counts real tokens alone, its forward does not
        mask = kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"]))
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clip(min=0)
    with torch.no_grad():
        out = model(**kwargs, output_hidden_states=True)
    if name in SEQ2SEQ:
        return {"token_logits": out.logits.numpy()} | two_sides(out)
    states = [state.numpy() for state in out.hidden_states]
    if name in CAUSAL:
        outputs = {"token_logits": out.logits.numpy(), "sequence": states[-1], "embeddings": states[0]}
        return outputs | {f"decoder/layer_{i}": state for i, state in enumerate(states[1:-1])}
    outputs = {"sequence": out.last_hidden_state.numpy(), "embeddings": states[0]}
    outputs |= {f"encoder/layer_{i}": state for i, state in enumerate(states[1:])}
    pooler = {"bert": "pooled", "vit": "pooler", "deit": "pooler"}.get(name)
    return outputs | ({pooler: out.pooler_output.numpy()} if pooler else {})


def two_sides(out):
    """Hidden states of an encoder and its decoder: embeddings, what each layer but the last gives, the last norm."""
    outputs = {}
    for side in ("encoder", "decoder"):
        states = [state.numpy() for state in out[f"{side}_hidden_states"]]
        outputs[("encoded", "sequence")[side == "decoder"]] = states[-1]
        outputs |= {f"{side}/layer_{i}": state for i, state in enumerate(states[1:-1])}
    return outputs
