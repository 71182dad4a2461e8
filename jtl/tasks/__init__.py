"""Tasks: for each its loss, metrics and decoding."""

from jtl.tasks.classify import Classify, accuracy, confusion, expected_calibration_error, macro_f1

__all__ = ["Classify", "accuracy", "confusion", "expected_calibration_error", "macro_f1"]
