"""Entry point of ``python -m experiments.progressive``."""

from experiments.common.command_line import main
from experiments.progressive.config import Progressive
from experiments.progressive.study import run

main(run, Progressive)
