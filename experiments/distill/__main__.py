"""Entry point of ``python -m experiments.distill``."""

from experiments.common.command_line import main
from experiments.distill.config import Distillation
from experiments.distill.study import run

main(run, Distillation)
