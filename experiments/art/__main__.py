"""Entry point of ``python -m experiments.art``."""

from experiments.art.config import Art
from experiments.art.study import predict, run
from experiments.common.command_line import main

main(run, Art, predict)
