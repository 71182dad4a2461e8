"""Entry point of ``python -m experiments.fewshot``."""

from experiments.common.command_line import main
from experiments.fewshot.config import FewShot
from experiments.fewshot.study import run

main(run, FewShot)
