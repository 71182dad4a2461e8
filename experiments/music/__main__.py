"""The command line: see the package."""

from experiments.common.command_line import main
from experiments.music.config import Music
from experiments.music.study import predict, run

main(run, Music, predict)
