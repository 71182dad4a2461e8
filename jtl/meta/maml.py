"""MAML: the gradient of the query loss after a few steps on the support set, taken through those steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl.errors import InputError
from jtl.loss import Aux
from jtl.meta.inner import Rate, TaskLoss, adapt, trajectory
from jtl.meta.tasks import Graded, mean_over_tasks, query_of
from jtl.model import Batch


def maml(
    *,
    steps: int,
    rate: Rate,
    labels: PyTree | None = None,
    first_order: bool = False,
    multi_step: bool = False,
    remat: bool = False,
    unroll: int = 1,
    chunk: int | None = None,
) -> Any:
    """Model-agnostic meta-learning (MAML), for ``make_step(loss, optimizer, gradient=maml(steps=5, rate=0.4))``.

    The value is the mean over tasks of the query loss after ``steps`` steps on the support, and its gradient is taken
    through the steps (Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    https://arxiv.org/abs/1703.03400, algorithm 1). One more argument gives

    * FOMAML, the paper's first-order approximation: ``first_order=True``;
    * ANIL (Raghu et al. 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML",
      https://arxiv.org/abs/1909.09157), where only the head adapts:
      ``labels=jtl.finetune.train_only(model, "head/.*")``;
    * BOIL (Oh et al. 2021, "BOIL: Towards Representation Change for Few-shot Learning",
      https://arxiv.org/abs/2008.08882), where all but the head adapts:
      ``labels=jtl.finetune.freeze(model, "head/.*")``;
    * T-Nets (Lee and Choi 2018, "Gradient-Based Meta-Learning with Learned Layerwise Metric and Subspace",
      https://arxiv.org/abs/1801.05558), where linear layers that only the outer loop trains lie between those that
      adapt, and so precondition the inner steps: ``labels=jtl.finetune.freeze(model, "warp_.*")``. WarpGrad
      (Flennerhag et al. 2020, "Meta-Learning with Warped Gradient Descent", https://arxiv.org/abs/1909.00025) trains
      such layers with its own objective, which is not implemented;
    * Meta-SGD and Meta-Curvature: ``rate=MetaSGD(0.01)`` on ``learn(model, MetaSGD(0.01))``;
    * parts of MAML++ (Antoniou et al. 2019, "How to train your MAML", https://arxiv.org/abs/1810.09502): the per-step
      rates, ``rate=PerStep(0.1, steps)``, and the loss over all steps, ``multi_step=True``. Its per-step batch
      statistics are not implemented.

    A batch is ``{"support": ..., "query": ...}``, each with a leading axis of tasks (``jtl.data.episodes``). The
    step's metrics are those of the query after the last inner step, and ``diverged``, the share of tasks whose query
    loss is not finite. The loss is then not finite either, and ``jtl.train.fit`` stops. Normalisation:
    ``Classify(stats="batch")`` is transductive, ``Classify()`` uses the running statistics, ``SupportStats`` those of
    the support. State that a forward updates, such as running statistics, is that of the query forward, averaged over
    tasks.

    Args:
        steps: inner steps.
        rate: of the inner loop: see ``adapt``.
        labels: which leaves adapt, and how fast: see ``adapt``. What the step trains and this leaves at 0 is shared by
            all tasks; what the step freezes cannot adapt.
        first_order: leave out the second derivatives.
        multi_step: the value is Σ w_i · query loss after step i, with the weights ``batch["step_weight"]`` (tasks,
            steps), for example from ``step_weights``.
        remat: trade time for memory: see ``adapt``.
        unroll: inner steps written out: see ``adapt``.
        chunk: tasks to run at a time; by default all.
    """

    def one(loss: TaskLoss, trained: PyTree, episode: Any, key: Array) -> tuple[Array, Aux]:
        inner_key, query_key = jax.random.split(key)
        query = query_of(episode)
        options: Any = {
            "steps": steps,
            "rate": rate,
            "labels": labels,
            "first_order": first_order,
            "remat": remat,
            "unroll": unroll,
        }
        after = lambda params: loss(params, query, query_key)  # noqa: E731
        if not multi_step:
            return after(adapt(loss, trained, episode["support"], inner_key, **options))
        if "step_weight" not in episode:
            raise InputError(
                "maml(multi_step=True) reads batch['step_weight'] (tasks, steps): see step_weights"
            )
        path = trajectory(loss, trained, episode["support"], inner_key, observe=after, **options)
        values, aux = path.observed
        return jnp.dot(episode["step_weight"], values), jax.tree.map(lambda x: x[-1], aux)

    def gradient(loss: TaskLoss, trained: PyTree, batch: Batch, key: Array) -> Graded:
        def graded(trained: PyTree, episode: Any, key: Array) -> Graded:
            value = lambda trained: one(loss, trained, episode, key)  # noqa: E731
            return jax.value_and_grad(value, has_aux=True)(trained)

        return mean_over_tasks(graded, trained, batch, key, chunk)

    return gradient


def step_weights(steps: int, progress: float) -> Float[Array, " steps"]:
    """The weights of MAML++'s loss over all steps, which sum to 1 and shift from uniform towards the last step.

    Each but the last is ``max(1 - progress, 0.03) / steps``, as in the authors' code; the paper gives no formula. For
    a batch: ``jnp.tile(step_weights(5, p)[None], (tasks, 1))``.

    Args:
        steps: inner steps.
        progress: from 0 to 1 over the part of training that anneals them.

    Raises:
        ValueError: ``progress`` is outside 0 ... 1.

    >>> [round(float(w), 3) for w in step_weights(4, 0.5)]
    [0.125, 0.125, 0.125, 0.625]
    """
    if not 0 <= progress <= 1:
        raise InputError(f"progress lies between 0 and 1, got {progress}")
    early = max(1 - progress, 0.03) / steps
    return jnp.full(steps, early).at[-1].set(1 - (steps - 1) * early)
