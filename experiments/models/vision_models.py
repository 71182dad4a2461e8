"""The part of `random_models` that is about convolutional networks: their settings, batches and outputs."""

import numpy as np

CONVOLUTIONAL = ("resnet", "convnext", "convnextv2")


def settings(name, rng, act, small):
    """Random settings under the names of the model's config class."""
    stages = 2 if small else int(rng.integers(1, 5))
    widths = tuple(4 * int(n) for n in rng.integers(1, 4, stages))
    depths = tuple(int(n) for n in rng.integers(1, 4, stages))
    if small:
        widths, depths = (8, 12), (1, 2)
    coin = lambda: bool(rng.random() < 0.5)  # noqa: E731
    common = dict(num_channels=int(rng.choice([1, 3])), hidden_sizes=widths, depths=depths, hidden_act=act)
    if name.startswith("convnext"):
        scale = {} if name == "convnextv2" else dict(layer_scale_init_value=float(rng.choice([0, 0.1])))
        return (
            common
            | scale
            | dict(
                num_stages=stages,
                patch_size=int(rng.choice([2, 3])),
                layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
                drop_path_rate=0.1,
            )
        )
    return common | dict(
        embedding_size=int(rng.choice([widths[0], 5])),
        layer_type="bottleneck" if small or coin() else "basic",
        downsample_in_first_stage=coin(),
        downsample_in_bottleneck=coin(),
    )


def clip_settings(rng, act, small):
    """Random settings of both towers."""
    towers = {}
    for tower in ("text", "vision"):
        heads, per_head = (3, 2) if small else (int(rng.choice([1, 2, 3])), int(rng.choice([4, 6])))
        towers[tower] = dict(
            hidden_size=heads * per_head,
            num_attention_heads=heads,
            num_hidden_layers=(1 if tower == "text" else 2) if small else int(rng.integers(1, 4)),
            intermediate_size=int(rng.integers(5, 16)),
            hidden_act=act,
            layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        )
    patch = int(rng.choice([2, 3]))
    towers["vision"] |= dict(
        patch_size=patch, image_size=patch * int(rng.integers(2, 5)), num_channels=int(rng.choice([1, 3]))
    )
    eos = 22 if small else int(rng.choice([2, 19, 22]))  # 2: the largest id
    towers["text"] |= dict(
        vocab_size=23, max_position_embeddings=11, eos_token_id=eos, bos_token_id=0, pad_token_id=1
    )
    return dict(
        text_config=towers["text"], vision_config=towers["vision"], projection_dim=int(rng.integers(3, 9))
    )


def clip_batch(config, rng, padded):
    """Random images, of another size than the native one if padded, and texts that end in their end-of-text token."""
    vision, eos = config["vision_config"], config["text_config"]["eos_token_id"]
    patch, native = vision["patch_size"], vision["image_size"]
    size = [patch * int(n) for n in rng.integers(1, 6, 2)] if padded else [native, native]
    ids = rng.integers(3, 18, (4, 9)).astype(np.int32)
    ends = rng.integers(1, 9, 4)
    ids[np.arange(4), ends] = 22 if eos == 2 else eos
    mask = (np.arange(9) <= ends[:, None]).astype(np.int32)
    inputs = {"image": rng.normal(size=(2, *size, vision["num_channels"])).astype(np.float32)}
    return inputs | {"input_ids": np.where(mask, ids, 1).astype(np.int32), "attention_mask": mask}


def clip_run(model, inputs):
    """Outputs by our names, and the hidden states of both towers."""
    import torch

    ids, mask = (torch.tensor(inputs[name]).long() for name in ("input_ids", "attention_mask"))
    pixels = torch.tensor(inputs["image"].transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = model(ids, pixels, mask, interpolate_pos_encoding=True)
        text = model.text_model(ids, mask, output_hidden_states=True)
        vision = model.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    outputs = {name: out[name].numpy() for name in ("image_embeds", "text_embeds", "logits_per_image")}
    outputs |= {
        "image_sequence": vision.last_hidden_state.numpy(),
        "text_sequence": text.last_hidden_state.numpy(),
    }
    for tower, found in (("text", text), ("vision", vision)):
        states = [state.numpy() for state in found.hidden_states]
        layers = len(model.get_submodule(f"{tower}_model.encoder.layers"))
        outputs |= {f"{tower}/encoder/layer_{i}": states[i + 1] for i in range(layers)}
    return outputs


def batch(name, config, rng):
    """Random images, of odd sizes too."""
    least = 14 if len(config["depths"]) < 3 else 24
    size = [int(n) for n in rng.integers(least, least + 14, 2)]
    return {"image": rng.normal(size=(2, *size, config["num_channels"])).astype(np.float32)}


def run(name, model, inputs):
    """Outputs by our names, and the hidden states, ours with the channels last."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(inputs["image"].transpose(0, 3, 1, 2)), output_hidden_states=True)
    states = [state.permute(0, 2, 3, 1).numpy() for state in (*out.hidden_states, out.last_hidden_state)]
    outputs = {"map": states.pop(), "pooled": out.pooler_output.flatten(1).numpy(), "embeddings": states[0]}
    return outputs | {f"encoder/stage_{i}": state for i, state in enumerate(states[1:])}
