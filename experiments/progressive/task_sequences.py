"""Sequences of tasks made ready for one kind of network: what every method of continual learning starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import data, pretrained
from jtl.data import Arrays, image, text
from jtl.data.sets.shift import Shifted, rotate
from jtl.errors import InputError
from jtl.model import Model, linen
from jtl.models.bert import Bert, BertConfig
from jtl.models.mlp import MLP

GREY = image.Preprocess(size=(28, 28), mean=(0.0,), std=(1.0,))  # paper is 0: it must not stir every weight
ANGLES = (0, 15, 30, 45, 60, 75)
DIGITS = ("mnist5k", "uci_digits", "rendered_digits")
FEW = 100  # training examples of the later tasks of digits: what transfer is for
TOPICS = {
    "comp": ("comp.graphics", "comp.os.ms-windows.misc", "comp.sys.mac.hardware", "comp.windows.x"),
    "rec": ("rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
}
VOCABULARY, LENGTH = 2000, 32
LIMITS = {"validation": 500, "test": 1000}


@dataclass(frozen=True)
class TaskSequence:
    """A sequence of tasks with equally many classes.

    Attributes:
        name: of the sequence.
        names: of the tasks, in order.
        splits: of each task ``train``, ``validation`` and ``test``; the rows have a ``task``, from 0.
        classes: C of every task.
        shared: whether all tasks have the same classes, so that one head can serve them.
        body: from a random key to a network without a head.
        width: of its features.
        blocks: where laterals lead, with ``head``: a regular expression.
        layers: the dense layers of the body: a regular expression.
    """

    name: str
    names: tuple[str, ...]
    splits: tuple[dict[str, Arrays], ...]
    classes: int
    shared: bool
    body: Callable[[Array], Model]
    width: int
    blocks: str
    layers: str


def prepare_tasks(
    name: str,
    *,
    hidden: tuple[int, ...],
    tasks: int,
    train: int,
    seed: int,
    limits: Mapping[str, int] = LIMITS,
    own: Sequence[str] = (),
) -> TaskSequence:
    """Load and encode a sequence.

    Args:
        name: ``split_mnist``, ``permuted_mnist``, ``rotated_mnist``, ``digits``, ``newsgroups`` or ``own``.
        hidden: widths of the network on images.
        tasks: how many, at most.
        train: training examples of each task at most, stratified; 0 takes all.
        seed: of the permutations and of the choice of training examples.
        limits: examples of the other splits at most.
        own: data sets of images for ``own``, a task each.

    Raises ValueError if own data sets differ in their number of classes or hold texts.
    """
    counts = {**limits, **({"train": train} if train else {})}
    if name == "newsgroups":
        return _newsgroups(counts, seed, tasks)
    loaded = [data.load(one) for one in (own or (DIGITS if name == "digits" else DIGITS[:1]))]
    if wrong := [one.name for one in loaded if one.kind != "image"]:
        raise InputError(f"--data {wrong[0]} holds texts; a sequence of your own is one of images")
    sizes = {one.name: len(one.classes) for one in loaded}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the tasks of a sequence have equally many classes, found {sizes}")
    names, splits, classes, shared = [one.name for one in loaded], [], len(loaded[0].classes), True
    if name == "split_mnist":
        classes, shared = 2, False
        names = [f"{2 * i}_or_{2 * i + 1}" for i in range(5)]
        whole = _pixels(loaded[0], {})
        splits = [
            {s: _cut(rows, (2 * i, 2 * i + 1), s, counts, seed) for s, rows in whole.items()}
            for i in range(5)
        ]
    elif name == "permuted_mnist":
        names = [f"permutation_{i}" for i in range(tasks)]
        whole = _pixels(loaded[0], counts, seed)
        order = [
            np.arange(784),
            *(np.random.default_rng((seed, i)).permutation(784) for i in range(1, tasks)),
        ]
        splits = [{s: (x[:, own], label) for s, (x, label) in whole.items()} for own in order]
    elif name == "rotated_mnist":
        names = [f"{angle}_degrees" for angle in ANGLES]
        splits = [_pixels(loaded[0], counts, seed, partial(_turned, angle)) for angle in ANGLES[:tasks]]
    else:
        few = {"train": min(FEW, train or FEW)} if name == "digits" else {}
        splits = [_pixels(one, {**counts, **(few if i else {})}, seed) for i, one in enumerate(loaded)]
    rows = [
        {
            s: Arrays({"x": x, "label": label, "task": np.full(len(label), i, np.int32)})
            for s, (x, label) in split.items()
        }
        for i, split in enumerate(splits[:tasks])
    ]
    return TaskSequence(name, tuple(names[:tasks]), tuple(rows), classes, shared, partial(_mlp, hidden), hidden[-1],
                 "dense_.*", "dense_.*")  # fmt: skip


Split = dict[str, tuple[np.ndarray, np.ndarray]]


def _turned(angle: float, picture: np.ndarray, _: int) -> np.ndarray:
    return rotate(picture, float(angle))


def _pixels(
    dataset: data.Dataset, counts: Mapping[str, int], seed: int = 0, change: Callable | None = None
) -> Split:
    """Flat grey images in [0, 1], (N, 784), and their labels."""
    found: Split = {}
    for split, source in dataset.splits.items():
        limit = counts.get(split, len(source))
        few = source if limit >= len(source) else data.subset(source, limit, seed)
        encoded = image.prepare(few if change is None else Shifted(few, change), GREY)
        batch = encoded.batch(np.arange(len(encoded)))
        found[split] = (batch["image"].reshape(len(encoded), -1), batch["label"])
    return found


def _cut(
    rows: tuple[np.ndarray, np.ndarray],
    classes: Sequence[int],
    split: str,
    counts: Mapping[str, int],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of some classes, which become 0, 1, ...; of each split so many at most."""
    x, label = rows
    kept = np.flatnonzero(np.isin(label, classes))
    new = np.searchsorted(classes, label[kept]).astype(np.int32)
    if counts.get(split, len(kept)) < len(kept):
        few = data.subset_indices(new, counts[split], seed)
        kept, new = kept[few], new[few]
    return x[kept], new


def _mlp(hidden: tuple[int, ...], key: Array) -> Model:
    module = MLP(hidden)
    return linen(module, jax.jit(module.init)(key, jnp.zeros((1, 784))))


# --- texts -----------------------------------------------------------------------------------------


def _newsgroups(counts: Mapping[str, int], seed: int, tasks: int) -> TaskSequence:
    """Four topics of 20 Newsgroups, four groups each; tokens outside the most frequent ones of training are unknown."""
    whole = data.load("newsgroups20")
    names = tuple(TOPICS)[:tasks]
    chosen: list[dict[str, tuple[text.Texts, np.ndarray]]] = []
    tokenizer = pretrained.tokenizer("minilm")
    for topic in names:
        groups = [whole.classes.index(group) for group in TOPICS[topic]]
        split_rows = {}
        for split, source in whole.splits.items():
            label = data.dataset.labels(source)
            kept = np.flatnonzero(np.isin(label, groups))
            new = np.array([groups.index(one) for one in label[kept]], np.int32)
            if counts.get(split, len(kept)) < len(kept):
                few = data.subset_indices(new, counts[split], seed)
                kept, new = kept[few], new[few]
            split_rows[split] = (text.encode(data.dataset.Subset(source, kept), tokenizer, LENGTH), new)
        chosen.append(split_rows)
    seen: Counter[int] = Counter()
    for part in chosen:
        texts, _ = part["train"]
        seen.update(_ids(texts)["input_ids"].ravel().tolist())
    number = np.zeros(len(tokenizer), np.int32)  # 0: unknown
    for place, (token, _) in enumerate(seen.most_common(VOCABULARY - 1), 1):
        number[token] = place
    splits = []
    for i, part in enumerate(chosen):
        rows = {}
        for split, (texts, label) in part.items():
            fields = _ids(texts)
            fields["input_ids"] = number[fields["input_ids"]]
            rows[split] = Arrays({**fields, "label": label, "task": np.full(len(label), i, np.int32)})
        splits.append(rows)
    return TaskSequence("newsgroups", names, tuple(splits), 4, False, _bert, 64, "encoder/layer_[0-9]+",
                 "encoder/.*/(query|key|value|output|intermediate)")  # fmt: skip


def _ids(texts: text.Texts) -> dict[str, np.ndarray]:
    batch = texts.batch(np.arange(len(texts)), LENGTH)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _bert(key: Array) -> Model:
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    module = Bert(config)
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    return linen(module, jax.jit(module.init)(key, ids, ids + 1))
