"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.fewshot.config import FewShot
from experiments.fewshot.study import run

cli(run, FewShot)
