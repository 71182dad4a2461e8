"""What the studies share: settings, the command line, resumable rows, and the end of a study."""

from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, above, at_least, at_most, check, prepare
from experiments.common.study import finish, transferred_or_scratch

__all__ = [
    "Config", "ResumableRows", "above", "at_least", "at_most", "check", "finish", "main", "prepare",
    "transferred_or_scratch",
]  # fmt: skip
