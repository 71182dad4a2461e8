"""Merging: one model of several that share a start, as pure functions of their parameters.

Adapters are merged as the weights that they make. The mean of A and the mean of B, which a soup of unmerged LoRAs
would take, are no factors of the mean of A·B. So fold each in first, and take one out again if the result is to be an
adapter; sums of ranks are always enough::

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
