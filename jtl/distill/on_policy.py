"""On-policy distillation: the student's own continuations of prompts, which its teacher then marks.

Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD),
arXiv:2306.13649, algorithm 1. Continuations of the *teacher* make it sequence-level distillation: Kim and Rush 2016,
arXiv:1606.07947, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jtl.errors import InputError
from jtl.model import Model
from jtl.tasks.generate import generate

MASK = "continuation"


def sample_continuations(
    model: Model,
    batch: Mapping[str, Any],
    *,
    prompt: int,
    temperature: float = 1.0,
    key: Array | None = None,
    eos_id: int | None = None,
) -> dict[str, Any]:
    """``batch`` with the texts after their first ``prompt`` tokens written by ``model``, to the length that they had.

    No gradient flows through the sampling, as in the paper. The field ``continuation`` (B, L) is 1 at positions that
    predict a written token, the paper's y given x: ``SequenceKD("jsd", mask="continuation")``. A teacher's stored
    columns no longer hold and are left out. With probability λ train on such a batch of the student, else on
    ``mask_continuations(batch, prompt=prompt)``; with λ = 1 and ``reverse_kl`` the teacher marks what the student
    would write.

    Args:
        model: one that ``jtl.tasks.generate`` takes.
        batch: ``input_ids`` and ``attention_mask`` (B, L); padding may stand on either side.
        prompt: tokens that are kept, padding included.
        temperature: of the sampling; 0 takes the likeliest tokens and needs no key.
        key: for drawing.
        eos_id: the token after which a text has ended.

    Raises:
        ValueError: ``prompt`` leaves nothing to write or to start from.
    """
    ids, mask = (jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask"))
    length = ids.shape[1]
    if not 0 < prompt < length:
        raise InputError(f"a prompt has at least 1 and at most {length - 1} of {length} tokens, got {prompt}")
    # Padding to the left: what is written follows the last real token.
    left = jnp.argsort(mask[:, :prompt] != 0, axis=1, stable=True)
    ids, mask = (jnp.take_along_axis(x[:, :prompt], left, 1) for x in (ids, mask))
    new = generate(
        model, ids, mask, max_new_tokens=length - prompt, temperature=temperature, key=key, eos_id=eos_id
    )
    ended = (
        jnp.zeros(new.shape, bool) if eos_id is None else jnp.cumsum(new == eos_id, 1) - (new == eos_id) > 0
    )
    kept = {
        name: value for name, value in batch.items() if not name.startswith("teacher") and name != "label"
    }
    mask = jnp.concatenate([mask, (~ended).astype(mask.dtype)], 1)
    return mask_continuations(
        {**kept, "input_ids": jnp.concatenate([ids, new], 1), "attention_mask": mask}, prompt=prompt
    )


def mask_continuations(batch: Mapping[str, Any], *, prompt: int) -> dict[str, Any]:
    """``batch`` with the field ``continuation``: 1 where a real token after the first ``prompt`` is predicted."""
    real = jnp.asarray(batch["attention_mask"]) != 0
    predicts = real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    after = jnp.arange(real.shape[1])[None] >= prompt - 1
    return {**batch, MASK: (predicts & after).astype(jnp.int32)}
