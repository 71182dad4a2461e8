"""Entry point of ``python -m experiments.models``."""

from experiments.models.commands import main

main()
