"""Entry point of ``python -m experiments.music``."""

from experiments.common.command_line import main
from experiments.music.config import Music
from experiments.music.study import predict, run

main(run, Music, predict)
