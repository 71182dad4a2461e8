"""The part of make_references.py that is about convolutional networks: their settings, batches and outputs."""

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
