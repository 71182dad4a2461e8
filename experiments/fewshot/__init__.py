"""Few-shot learning: meta-learning algorithms, metric learners and baselines on classes never seen in training.

An N-way K-shot task shows K examples of each of N new classes and asks for the class of others. ``maml``, ``fomaml``,
``anil`` and ``reptile`` meta-train an inner loop, ``prototypes``, ``matching`` and ``ridge`` the features of a
closed-form classifier. Baselines: ``scratch`` fine-tunes the untrained network on the task; ``head``,
``nearest_centroid`` and ``baseline_plus_plus`` put a classifier on the frozen features of a network trained on all
training classes. Papers stand at the algorithms in ``jtl.meta``.

    python -m experiments.fewshot --out runs/fewshot
    python -m experiments.fewshot --data newsgroups20 --backbone minilm --ways 5 5 --shots 1 5 --updates 500 --out text

``--data`` is ``glyphs`` (letters of many scripts, whole alphabets held out), ``newsgroups20``, a folder of images or
``tfds:NAME``, such as ``tfds:omniglot``. ``--normalise transductive`` takes the statistics of the query batch itself,
as MAML's authors do, so a row's prediction depends on the others; ``support`` takes those of the support.
"""

from experiments.fewshot.config import FewShot
from experiments.fewshot.study import run

__all__ = ["FewShot", "run"]
