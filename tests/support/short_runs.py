"""A command run for real with ``--quick``, and what it leaves, for the tests of experiments."""

import json

from experiments.common.settings import Config


def run(module, out, **settings):
    """The result of an experiment's module with ``--quick``, in a folder."""
    (config,) = (
        own
        for own in vars(module).values()
        if isinstance(own, type) and issubclass(own, Config) and own.__module__ == module.__name__
    )
    return module.run(config(out=out, quick=True, **settings))


def means(result, metric):
    """A metric's mean by arm."""
    return {arm: own["mean"] for arm, own in result.summary[metric].items()}


def lines(folder):
    """The entries of rows.jsonl."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def figures(folder):
    """Names of the pictures in a folder that are not all but empty."""
    return {path.stem for path in folder.glob("*.png") if path.stat().st_size > 5_000}
