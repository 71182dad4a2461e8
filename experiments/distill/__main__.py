"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.distill.config import Distillation
from experiments.distill.study import run

cli(run, Distillation)
