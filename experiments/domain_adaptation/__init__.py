"""Domain adaptation: what each method gains where labels exist for the source alone.

Every method trains from the same start with the same number of updates, on labelled source examples and unlabelled
target examples. ``accuracy`` is the target test accuracy of the model that information maximisation chooses, a rule
without target labels; ``oracle`` chooses with target labels, ``last`` takes the end of the run. ``source_only`` and
``target_trained`` bound the rest.

    python -m experiments.domain_adaptation --task mnist_m newsgroups --out runs/domain_adaptation

Tasks: ``mnist_m`` (Ganin et al. 2016, https://arxiv.org/abs/1505.07818), ``mnist_uci``, ``uci_mnist``,
``rendered_mnist`` and ``newsgroups``, which is six (Dai et al. 2007); or any ``--source`` and ``--target`` of the same
classes. ``--model`` names a pretrained model to fine-tune or, with ``--frozen``, to take features from.
"""

from experiments.domain_adaptation.config import DomainAdaptation
from experiments.domain_adaptation.study import run

__all__ = ["DomainAdaptation", "run"]
