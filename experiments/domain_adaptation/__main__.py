"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.domain_adaptation.study import DomainAdaptation, run

cli(run, DomainAdaptation)
