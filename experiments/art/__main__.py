"""The command line: see the package."""

from experiments.art.config import Art
from experiments.art.study import main
from experiments.common.command_line import cli

cli(main, Art)
