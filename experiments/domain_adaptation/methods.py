"""The methods of ``experiments.domain_adaptation``: what each puts on a model, minimises, and trains on.

A method is a function from what all start with (``Trial``) to a ``Recipe``. Weights of loss terms are those of the
papers, or 1; none was chosen with target labels. The papers are named in ``jtl.domain``. ``adabn`` and ``tent`` adapt
a trained model and are no recipes: see ``training``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, SupportsIndex, get_args

import jax
import numpy as np
from jaxtyping import Float

from experiments.common.recipe import Recipe
from jtl import domain, ema, finetune, tree
from jtl.data.batches.loader import Batches, Encoded, Steps
from jtl.data.batches.mixing import SideBySide
from jtl.loss import Loss
from jtl.model import Model
from jtl.outputs import outputs
from jtl.tasks import Classify

Method = Literal[
    "source_only", "target_trained", "augmented",
    "dann", "cdan", "cdan_e", "adda", "mdd", "mcd",
    "dan", "jan", "coral", "afn", "bsp", "mcc", "jdot",
    "pseudo_labels", "fixmatch", "mean_teacher", "shot",
    "adabn", "tent", "importance",
]  # fmt: skip
NAMES: tuple[Method, ...] = get_args(Method)
ONLY_IMAGE = ("augmented", "fixmatch")  # strong views are changes of pixels
ONLY_BATCH_NORM = ("adabn", "tent")
STAGES = {"shot": 10}  # how often in a run a method is asked anew for its batches
TARGET_SEED = 1_000_000  # added to the seed of the order of target examples
HIDDEN = (100,)  # of the discriminators, as in the DANN paper's network for MNIST-M


@dataclass
class Trial:
    """What every method starts with, for one seed.

    Attributes:
        model: a body and a new classifier.
        train: the encoded training examples of ``"source"`` and ``"target"``.
        classes: C.
        steps: updates of a run.
        batch_size: rows of each domain in a batch.
        stats: how the model normalises while training.
        width: size of ``features``.
        seed: of new leaves and of the order of examples.
        buckets: padded lengths of texts.
        trained_on_source: gives the model that ``source_only`` trains, the one that validated best on source.
    """

    model: Model
    train: dict[str, Encoded]
    classes: int
    steps: int
    batch_size: int
    stats: Literal["running", "batch"]
    width: int
    seed: int
    buckets: tuple[int, ...] | None
    trained_on_source: Callable[[], Model] = field(repr=False)

    @property
    def key(self) -> jax.Array:
        """For new leaves."""
        return jax.random.fold_in(jax.random.key(self.seed), 1)

    @property
    def supervised(self) -> Loss:
        """Cross-entropy of the source rows."""
        return domain.Source(Classify(stats=self.stats))

    @property
    def trained(self) -> Model:
        """The model that source alone has trained, for methods that go on from it."""
        return self.trained_on_source()

    def after(self, model: Model) -> Trial:
        """The trial of the next stage of a method, which goes on from ``model``."""
        return replace(self, trained_on_source=lambda: model)

    def only(self, name: str) -> Batches:
        """Training batches of one domain, labels and all."""
        train = self.train[name]
        # MNIST-M holds MNIST's digits in MNIST's order: in one order of both, each batch would hold pairs of the same.
        seed = self.seed + (TARGET_SEED if name == "target" else 0)
        return Batches(train, self.batch_size, seed=seed, steps=self.steps, buckets=self.buckets)

    def both(self) -> SideBySide:
        """Training batches of both domains, those of the target without labels."""
        return SideBySide([self.only("source"), self.only("target")])

    def unlabelled(self, size: int = 256) -> Batches:
        """Every target training example once."""
        return Batches(self.train["target"], size, train=False, buckets=self.buckets)

    def plus(self, term: Loss, weight: float = 1.0, model: Model | None = None) -> Recipe:
        """The supervised term and another, on batches of both domains."""
        model = self.model if model is None else model
        return Recipe(model, self.supervised + weight * term, self.both())

    def adversarial(self, **options: Any) -> Model:
        """The model with a discriminator behind a reversal."""
        return domain.adversary(
            self.model, horizon=self.steps, key=self.key, width=self.width, hidden=HIDDEN, **options
        )


@dataclass(frozen=True)
class Changed:
    """``batches`` with ``change(batch, step)`` in place of each batch."""

    batches: Steps
    change: Callable[[dict[str, Any], int], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: SupportsIndex) -> dict[str, Any]:
        return self.change(self.batches[step], int(step))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[step] for step in range(len(self)))


# --- bounds ----------------------------------------------------------------------------------------


def source_only(trial: Trial) -> Recipe:
    """Trained on source alone: the lower bound."""
    return Recipe(trial.model, Classify(stats=trial.stats), trial.only("source"))


def target_trained(trial: Trial) -> Recipe:
    """Trained on the target's own labels: the upper bound."""
    return Recipe(trial.model, Classify(stats=trial.stats), trial.only("target"))


def augmented(trial: Trial) -> Recipe:
    """Source alone, in the views of ``fixmatch``: what that method owes to them, and not to the target."""
    return Recipe(
        trial.model, Classify(stats=trial.stats), Changed(trial.only("source"), partial(views, trial.seed))
    )


# --- adversarial -----------------------------------------------------------------------------------


def dann(trial: Trial) -> Recipe:
    """A discriminator behind a gradient reversal."""
    return trial.plus(domain.DANN(stats=trial.stats), model=trial.adversarial())


def cdan(trial: Trial, *, entropy: bool = False) -> Recipe:
    """DANN on features and predictions together."""
    model = domain.conditional_adversary(
        trial.model,
        classes=trial.classes,
        horizon=trial.steps,
        key=trial.key,
        width=trial.width,
        hidden=HIDDEN,
    )
    return trial.plus(domain.CDAN(entropy=entropy, stats=trial.stats), model=model)


def cdan_e(trial: Trial) -> Recipe:
    """CDAN whose sure rows count more."""
    return cdan(trial, entropy=True)


def bsp(trial: Trial) -> Recipe:
    """DANN with batch spectral penalisation."""
    return trial.plus(
        domain.DANN(stats=trial.stats) + 1e-4 * domain.BSP(stats=trial.stats), model=trial.adversarial()
    )


def mdd(trial: Trial) -> Recipe:
    """An adversarial classifier under the margin disparity discrepancy."""
    model = trial.adversarial(outputs=trial.classes, name="adversary", output="adversary_logits", peak=0.1)
    return trial.plus(domain.MDD(stats=trial.stats), model=model)


def mcd(trial: Trial) -> Recipe:
    """Two classifiers that disagree; the second does not vote."""
    model = domain.two_heads(trial.model, key=trial.key, width=trial.width)
    return Recipe(model, domain.MCD(stats=trial.stats), trial.both(), labels=domain.alternate(model))


def adda(trial: Trial) -> Recipe:
    """A target encoder against the fixed source encoder, both trained on source first."""
    model = domain.discriminator(trial.trained, key=trial.key, width=trial.width, hidden=HIDDEN)
    # The encoder is slower than the discriminator, and its classifier stays.
    labels = tree.assign([("head/.*", 0.0), ("discriminator/.*", 1.0), (".*", 0.1)], model.params)
    return Recipe(model, domain.ADDA(trial.trained, stats=trial.stats), trial.both(), labels=labels)


# --- discrepancy and transport ---------------------------------------------------------------------


def dan(trial: Trial) -> Recipe:
    """MK-MMD of features and logits."""
    return trial.plus(domain.DAN(stats=trial.stats))


def jan(trial: Trial) -> Recipe:
    """MMD of features and predictions together."""
    return trial.plus(domain.JAN(stats=trial.stats))


def coral(trial: Trial) -> Recipe:
    """Covariances of the logits. The paper sets the weight so that both losses end alike: 1 for scores so small."""
    return trial.plus(domain.CORAL(on="logits", stats=trial.stats))


def afn(trial: Trial) -> Recipe:
    """Growing feature norms."""
    return trial.plus(domain.AFN(stats=trial.stats), 0.05)


def mcc(trial: Trial) -> Recipe:
    """Minimum class confusion."""
    return trial.plus(domain.MCC(stats=trial.stats))


def jdot(trial: Trial) -> Recipe:
    """Joint transport of features and labels."""
    return trial.plus(domain.JDOT(stats=trial.stats))


# --- self-training ---------------------------------------------------------------------------------


def pseudo_labels(trial: Trial) -> Recipe:
    """Target rows under their own confident labels."""
    return trial.plus(domain.PseudoLabels(stats=trial.stats))


def fixmatch(trial: Trial) -> Recipe:
    """Strong views of target rows under the confident labels of the plain ones.

    The source is seen in both views too, as in AdaMatch (Berthelot et al. 2022, https://arxiv.org/abs/2106.04732),
    each row in one of them.
    """
    batches = Changed(trial.both(), partial(views, trial.seed))
    return Recipe(trial.model, trial.supervised + domain.FixMatch(stats=trial.stats), batches)


def mean_teacher(trial: Trial) -> Recipe:
    """Agreement with the running average of the model, which is what is evaluated."""
    model = ema.with_teacher(trial.model, decay=0.99)
    return Recipe(
        model,
        trial.supervised + domain.MeanTeacher(stats=trial.stats),
        trial.both(),
        finish=ema.average_model,
    )


def shot(trial: Trial) -> Recipe:
    """Without source data: the source's classifier is frozen, pseudo-labels of centroids come anew in each stage."""
    found = outputs(trial.trained, trial.unlabelled(), ("features", "logits"))
    named = domain.centroid_labels(found["features"], found["logits"])

    def put(batch: dict[str, Any], _: int) -> dict[str, Any]:
        return {**batch, "label": np.full_like(batch["label"], -1), "pseudo_label": named[batch["index"]]}

    labels = finetune.freeze(trial.trained, "head/.*")
    return Recipe(
        trial.trained, domain.SHOT(stats=trial.stats), Changed(trial.only("target"), put), labels=labels
    )


# --- weights ---------------------------------------------------------------------------------------


def importance(trial: Trial) -> Recipe:
    """Source rows weighted by how much their features look like the target's; the largest weight is 10."""
    source = Batches(trial.train["source"], 256, train=False, buckets=trial.buckets)
    mine, its = (outputs(trial.trained, batches)["features"] for batches in (source, trial.unlabelled()))
    weight = domain.density_ratio(mine, its, mine)
    weight = np.minimum(weight / weight.mean(), 10.0).astype(np.float32)

    def weigh(batch: dict[str, Any], _: int) -> dict[str, Any]:
        return {**batch, "weight": batch["weight"] * weight[batch["index"]]}

    return Recipe(trial.model, Classify(stats=trial.stats), Changed(trial.only("source"), weigh))


def views(seed: int, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """``batch`` with ``strong``, the strong view of each image; about half of the source's own images become theirs."""
    rng = np.random.default_rng((seed, step))
    strong = strong_view(batch["image"], rng)
    drawn = rng.random(len(strong)) < 0.5
    drawn &= batch["domain"] == 0 if "domain" in batch else True
    return {**batch, "strong": strong, "image": np.where(drawn[:, None, None, None], strong, batch["image"])}


def strong_view(
    image: Float[np.ndarray, "B H W C"], rng: np.random.Generator
) -> Float[np.ndarray, "B H W C"]:
    """Images in [-1, 1] whose contrast is scaled and perhaps inverted, colours shifted, with noise.

    The changes of intensity that French et al. 2018 (https://arxiv.org/abs/1706.05208, appendix) make between digits.
    """
    rows = (len(image), 1, 1)
    scale = rng.uniform(0.5, 1.5, (*rows, 1)) * rng.choice([-1.0, 1.0], (*rows, 1))
    shift = rng.uniform(-0.3, 0.3, (*rows, image.shape[-1]))
    noise = rng.normal(0.0, 0.1, image.shape)
    return np.clip(image * scale + shift + noise, -1.0, 1.0).astype(np.float32)


METHODS: dict[Method, Callable[[Trial], Recipe]] = {
    "source_only": source_only, "target_trained": target_trained, "augmented": augmented,
    "dann": dann, "cdan": cdan, "cdan_e": cdan_e, "adda": adda, "mdd": mdd, "mcd": mcd,
    "dan": dan, "jan": jan, "coral": coral, "afn": afn, "bsp": bsp, "mcc": mcc, "jdot": jdot,
    "pseudo_labels": pseudo_labels, "fixmatch": fixmatch, "mean_teacher": mean_teacher, "shot": shot,
    "importance": importance,
}  # fmt: skip
