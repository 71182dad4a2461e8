"""Merging: combines several models fine-tuned from one start into one, as pure functions of their parameters.

Merge adapters as the weights that they make. A soup of unmerged LoRAs would take the mean of A and the mean of B, but
their product is not the mean of A·B. So fold each adapter in first, and extract one again if the result should be an
adapter; a rank equal to the sum of the ranks is always enough::

    folded = [jtl.adapters.merge(model).params for model in models]
    soup = start.with_params(merging.uniform_soup(folded))
    adapter = jtl.adapters.extract(start, soup, rank=16, where=".*/(query|value)")
"""

from jtl.merging.average import greedy_soup, slerp, uniform_soup, wise_ft
from jtl.merging.task_vectors import dare, task_arithmetic, task_vector, ties
from jtl.merging.weighted import fisher_average, input_grams, regmean

__all__ = [
    "dare", "fisher_average", "greedy_soup", "input_grams", "regmean", "slerp", "task_arithmetic", "task_vector",
    "ties", "uniform_soup", "wise_ft",
]  # fmt: skip
