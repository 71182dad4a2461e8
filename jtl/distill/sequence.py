"""Distillation of sequence models, token by token: forward and reverse KL, generalised JSD, cached top-k teachers.

Word-level distillation: Kim and Rush 2016, "Sequence-Level Knowledge Distillation", https://arxiv.org/abs/1606.07947.
Reverse KL: Gu et al. 2023, "MiniLLM: Knowledge Distillation of Large Language Models",
https://arxiv.org/abs/2306.08543. Generalised Jensen-Shannon divergence: Agarwal et al. 2023, "On-Policy Distillation
of Language Models: Learning from Self-Generated Mistakes" (GKD), https://arxiv.org/abs/2306.13649.

Inputs are logits (B, L, V) and a mask (B, L) of the positions whose *predictions* count. For a language model these
are the positions that predict a real token, one to the left of that token. Values are means over these positions, in
nats.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Term, read, row_weight
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Model, Outputs

Mask = Float[Array, "..."] | Int[Array, "..."] | None  # (B, L), which ``_weight`` checks
TOKENS = "token_logits"
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def forward_kl(
    student_logits: Float[Array, "B L V"],
    teacher_logits: term.Teacher,
    mask: Mask = None,
    temperature: Any = 1.0,
) -> Float[Array, ""]:
    """Word-level distillation: the mean over positions of ``T² · KL(teacher || student)``.

    Args:
        student_logits: (B, L, V).
        teacher_logits: (B, L, V).
        mask: of the positions that count; by default all.
        temperature: T.

    Raises:
        ValueError: lengths or vocabularies differ.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return jnp.square(temperature) * rows.mean(rows.kl(teacher, student), _weight(mask, student))


def reverse_kl(
    student_logits: Float[Array, "B L V"],
    teacher_logits: term.Teacher,
    mask: Mask = None,
    temperature: Any = 1.0,
) -> Float[Array, ""]:
    """The mean over positions of ``T² · KL(student || teacher)``; arguments as in ``forward_kl``.

    It seeks a mode of the teacher where ``forward_kl`` covers all of them. MiniLLM minimises it over sequences that
    the student samples; on given sequences this is its one-step part.

    Raises:
        ValueError: lengths or vocabularies differ.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return jnp.square(temperature) * rows.mean(rows.kl(student, teacher), _weight(mask, student))


def generalised_jsd(
    student_logits: Float[Array, "B L V"],
    teacher_logits: term.Teacher,
    mask: Mask = None,
    temperature: Any = 1.0,
    *,
    beta: float = 0.5,
) -> Float[Array, ""]:
    """The mean over positions of ``T² · (β KL(p_t || m) + (1 - β) KL(p_s || m))``, ``m = β p_t + (1 - β) p_s``.

    This is GKD's JSD(β); arguments as in ``forward_kl``. It is 0 for every pair at β = 0 and 1. Divided by β it tends
    to ``forward_kl`` as β → 0; divided by 1 - β it tends to ``reverse_kl`` as β → 1.

    Raises:
        ValueError: β is not inside (0, 1), or lengths or vocabularies differ.
    """
    if not 0 < beta < 1:
        raise InputError(f"beta lies between 0 and 1, got {beta}; its limits are forward_kl and reverse_kl")
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    middle = jnp.logaddexp(jnp.log(beta) + teacher, jnp.log1p(-beta) + student)
    values = beta * rows.kl(teacher, middle) + (1 - beta) * rows.kl(student, middle)
    return jnp.square(temperature) * rows.mean(values, _weight(mask, student))


def top_k(
    teacher_logits: Float[Array, "... V"], k: int, temperature: float = 1.0
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Returns the k largest log-probabilities of the teacher at ``temperature``, and their token ids, to be cached.

    Raises:
        ValueError: k is not in 1 ... V.
    """
    if not 1 <= k <= teacher_logits.shape[-1]:
        raise InputError(f"top_k keeps 1 to {teacher_logits.shape[-1]} of the vocabulary, got k={k}")
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    kept, places = jax.lax.top_k(log_p, k)
    return kept, places


def forward_kl_top_k(
    student_logits: Float[Array, "B L V"],
    log_probabilities: Float[Array, "b l k"],
    places: Int[Array, "b l k"],
    mask: Mask = None,
    temperature: Any = 1.0,
) -> Float[Array, ""]:
    """``forward_kl`` to a cached teacher of which ``top_k`` kept the k largest log-probabilities.

    All other tokens count as one event, with the remaining probability. This divergence never exceeds ``forward_kl``
    and equals it at k = V.

    Args:
        student_logits: (B, L, V).
        log_probabilities: (B, L, k), from ``top_k``.
        places: (B, L, k), their token ids. An id outside the vocabulary makes the loss NaN.
        mask: of the positions that count; by default all.
        temperature: T; must be that of the cache.

    Raises:
        ValueError: rows or lengths differ, or k is above the vocabulary.
    """
    if log_probabilities.shape[:2] != student_logits.shape[:2]:
        raise InputError(
            f"cached top-k: the student gives {student_logits.shape[:2]} rows and positions, the cache "
            f"{log_probabilities.shape[:2]}; tokenise both alike: one tokenizer and one padded length"
        )
    vocabulary, k = student_logits.shape[-1], log_probabilities.shape[-1]
    if k > vocabulary:
        raise InputError(f"cached top-k: k={k} is above the student's vocabulary of {vocabulary}")
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    teacher = log_probabilities.astype(jnp.float32)
    # An id outside the vocabulary (another tokenizer) makes the loss NaN; JAX would use the last token.
    kept = jnp.take_along_axis(student, places, -1, mode="fill", fill_value=jnp.nan)
    if k < vocabulary:
        batch, length = (jnp.arange(n) for n in student.shape[:2])
        others = student.at[batch[:, None, None], length[None, :, None], places].set(-jnp.inf)
        left = -jnp.expm1(jnp.minimum(jax.nn.logsumexp(teacher, -1), 0.0))
        rest = jnp.where(left > 0, jnp.log(jnp.where(left > 0, left, 1.0)), -jnp.inf)
        teacher = jnp.concatenate([teacher, rest[..., None]], -1)
        kept = jnp.concatenate([kept, jax.nn.logsumexp(others, -1)[..., None]], -1)
    return jnp.square(temperature) * rows.mean(rows.kl(teacher, kept), _weight(mask, student))


def _log_probabilities(student: Array, teacher: Array, temperature: Any) -> tuple[Array, Array]:
    term.same_classes(student, teacher)
    first, second = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher))
    return first, second


def _weight(mask: Mask, logits: Array) -> Array | None:
    if mask is None:
        return None
    if mask.shape != logits.shape[:2]:
        raise InputError(f"the mask has shape {mask.shape}, the logits {logits.shape[:2]} positions")
    return mask.astype(jnp.float32)


class _Sequence(Term, kw_only=True):
    """Base of the losses here, which read ``token_logits`` (B, L, V) as language models return them.

    Attributes:
        mask: the batch field (B, L) of positions that count. None: those that predict a real token from a real one, by
            ``attention_mask``, as in ``jtl.tasks.CausalLM``; all but the last if there is no such field.
    """

    mask: str | None = struct.field(pytree_node=False, default=None)

    def student_names(self) -> tuple[str, ...]:
        """Returns the logits of each token."""
        return (TOKENS,)

    def teacher_names(self) -> tuple[str, ...]:
        """Returns the logits of each token."""
        return (TOKENS,)

    def positions(self, batch: Batch, logits: Array) -> Float[Array, "B L"]:
        """Returns the weight of each position, 0 in rows of weight 0.

        Raises:
            KeyError: the batch lacks ``mask``.
            ValueError: the logits are not (B, L, V).
        """
        if logits.ndim != 3:
            raise InputError(
                f"{type(self).__name__} takes token_logits (B, L, V), the student gives {logits.shape}"
            )
        if self.mask is not None:
            if self.mask not in batch:
                raise MissingError(
                    f"the batch has no field {self.mask!r} of positions; it has {sorted(batch)}"
                )
            mask = jnp.asarray(batch[self.mask]) != 0
        else:
            real = jnp.asarray(batch.get("attention_mask", jnp.ones(logits.shape[:2]))) != 0
            mask = real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
        weight = row_weight(batch)
        return mask.astype(jnp.float32) * (1.0 if weight is None else weight[:, None])


class SequenceKD(_Sequence):
    """A divergence between student and teacher at each position of a sequence.

    Attributes:
        divergence: ``"forward_kl"``, ``"reverse_kl"`` or ``"jsd"``.
        beta: of ``"jsd"``.
        temperature: T.
    """

    divergence: Divergence = struct.field(pytree_node=False, default="forward_kl")
    beta: float = struct.field(pytree_node=False, default=0.5)
    temperature: Any = 1.0

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        logits, taught = read(outputs, TOKENS), self.taught(batch, TOKENS)
        mask = self.positions(batch, logits)
        if self.divergence == "jsd":
            return generalised_jsd(logits, taught, mask, self.temperature, beta=self.beta), {}
        divergence = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[self.divergence]
        return divergence(logits, taught, mask, self.temperature), {}


class TopKSequenceKD(_Sequence):
    """``forward_kl_top_k`` to the batch columns ``teacher_top_log_probabilities`` and ``teacher_top_places``.

    Attributes:
        temperature: T, that of the cache.
    """

    temperature: Any = 1.0

    def teacher_names(self) -> tuple[str, ...]:
        """Returns nothing, because there is no live teacher."""
        return ()

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the batch lacks the columns.
        """
        names = ("teacher_top_log_probabilities", "teacher_top_places")
        if missing := [name for name in names if name not in batch]:
            raise MissingError(
                f"TopKSequenceKD reads the columns {missing} of the batch: cache them with top_k"
            )
        kept, places = (jnp.asarray(batch[name]) for name in names)
        logits = read(outputs, TOKENS)
        return forward_kl_top_k(logits, kept, places, self.positions(batch, logits), self.temperature), {}
