"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.progressive.config import Progressive
from experiments.progressive.study import run

cli(run, Progressive)
