"""The command line: see the package."""

from experiments.models.commands import main

main()
