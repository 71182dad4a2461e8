"""Small random classifiers of transformers, for the tests of PEFT's files."""

import jax
import numpy as np

from jtl import adapters, tree

TEXT = dict(
    vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, num_labels=3
)  # fmt: skip
IMAGE = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=12, patch_size=4,
    num_labels=3,
)  # fmt: skip
DISTIL = dict(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=40, num_labels=3)
MODELS = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", TEXT),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTIL),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
}
METHODS = {
    "lora": (adapters.lora, {"rank": 3}),
    "rslora": (adapters.lora, {"rank": 3, "alpha": 5.0, "stabilised": True}),
    "patterns": (
        adapters.lora,
        {"rank": ((".*query", 2), (".*", 4)), "alpha": ((".*value", 3.0), (".*", 8.0))},
    ),
    "dora": (adapters.dora, {"rank": 3}),
    "ia3": (adapters.ia3, {}),
    "vera": (adapters.vera, {"rank": 5, "initial": 20.0}),
    "adalora": (adapters.adalora, {"rank": 4, "alpha": 6.0}),
}


def torch_model(name, folder):
    import torch
    import transformers

    config, cls, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def batch_of(name):
    rng = np.random.default_rng(0)
    if MODELS[name][2] is TEXT or name == "distilbert":
        mask = np.ones((2, 7), np.int32)
        mask[1, 5:] = 0
        return {"input_ids": rng.integers(3, 60, (2, 7)).astype(np.int32), "attention_mask": mask}
    return {"image": rng.normal(size=(2, 12, 12, 3)).astype(np.float32)}


def torch_batch(batch):
    import torch

    if "image" in batch:
        return {"pixel_values": torch.tensor(batch["image"].transpose(0, 3, 1, 2))}
    return {field: torch.tensor(value).long() for field, value in batch.items()}


def torch_logits(model, batch):
    import torch

    with torch.no_grad():
        return model.eval()(**torch_batch(batch)).logits.numpy()


def for_task(name):
    """What a PEFT configuration needs to save the head of a model."""
    from peft import TaskType

    if "input_ids" in batch_of(name):
        return {"task_type": TaskType.SEQ_CLS}
    return {"modules_to_save": ["classifier"]}


def stir_torch(model):
    """Noise in place of all that trains, the head too."""
    import torch

    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("ia3" in path or "magnitude" in path), std=0.2)
    return model


def stirred(model):
    """Noise on the leaves of adapters and of the head."""

    def noise(path, leaf):
        key = tree.fold_path(jax.random.key(7), path)
        own = path.startswith("head/") or any(f"/{name}/" in path for name in METHODS)
        return leaf + 0.2 * jax.random.normal(key, leaf.shape) if own else leaf

    return model.with_params(tree.map_with_path(noise, model.params))


def close(found, expected, error=1e-4):
    np.testing.assert_allclose(found, expected, atol=error, rtol=error)


def differ(found, other, least=1e-3):
    """By more than ten times what ``close`` allows."""
    assert np.abs(found - other).max() > least
