"""Merging: one model of several that share a start, as pure functions of their parameters."""

from jtl.merging.average import greedy_soup, slerp, uniform_soup, wise_ft
from jtl.merging.task_vectors import dare, task_arithmetic, task_vector, ties
from jtl.merging.weighted import fisher_average, input_grams, regmean

__all__ = [
    "dare", "fisher_average", "greedy_soup", "input_grams", "regmean", "slerp", "task_arithmetic", "task_vector",
    "ties", "uniform_soup", "wise_ft",
]  # fmt: skip
