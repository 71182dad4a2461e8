"""Experiments: a module or a package each, run as ``python -m experiments.NAME --out DIR``."""
