"""Art: fine-tune a small image generator on a new style from twenty pictures.

A small class-conditional U-Net learns 3,500 MNIST digits by flow matching (Lipman et al. 2023,
https://arxiv.org/abs/2210.02747). ``transfer`` then learns a new style from two pictures a class by LoRA (Hu et al.
2021, https://arxiv.org/abs/2106.09685) with the prior preservation of DreamBooth (Ruiz et al. 2023,
https://arxiv.org/abs/2208.12242, equation 2); ``scratch`` trains the same architecture from random weights on the same
pictures. ``before`` is the pretrained model as it is, ``real`` are held-out pictures of the style.

    python -m experiments.art --out runs/art
    python -m experiments.art --out runs/art --predict 7

The second command draws new pictures of a class with the model that the first left in ``OUT``. Your own style: ``--data
FOLDER`` of about twenty pictures, or a folder with a folder for each class; ``--data tfds:NAME``.
"""

from experiments.art.config import Art
from experiments.art.study import run

__all__ = ["Art", "run"]
