"""Entry point of ``python -m experiments.domain_adaptation``."""

from experiments.common.command_line import main
from experiments.domain_adaptation.config import DomainAdaptation
from experiments.domain_adaptation.study import run

main(run, DomainAdaptation)
