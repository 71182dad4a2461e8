"""Knowledge distillation: how much each method gives a smaller student, and what the student costs.

A pretrained model is fine-tuned and becomes the teacher. Students start from some of its layers or from random weights
and train for as many updates under each method of ``jtl.distill``. ``student_alone`` learns from the labels only.

    python -m experiments.distill --setting text --out runs/distill
    python -m experiments.distill --setting image --method soft_targets dist hint --out runs/distill_image

Settings: ``text`` and ``text_1_layer`` (MiniLM of six layers on Rotten Tomatoes to three and to one), ``text_few`` (256
labels), ``newsgroups`` and ``newsgroups_1_layer``, ``image`` (EfficientNet-Lite0 on digits to a network of four
convolutions), ``born_again`` (MiniLM to itself); or your own ``--model``, ``--data`` and ``--student``.
"""

from experiments.distill.config import Distillation
from experiments.distill.study import run

__all__ = ["Distillation", "run"]
