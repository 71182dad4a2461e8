"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.music.config import Music
from experiments.music.study import main

cli(main, Music)
