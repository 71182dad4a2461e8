"""Tasks: for each its loss, metrics and decoding."""

from jtl.tasks.causal import CausalLM
from jtl.tasks.classify import Classify, accuracy, confusion, expected_calibration_error, macro_f1
from jtl.tasks.generate import generate
from jtl.tasks.masked import MaskedLM, mask, masked_head, without_masked_head

__all__ = [
    "CausalLM", "Classify", "MaskedLM", "accuracy", "confusion", "expected_calibration_error", "generate", "macro_f1",
    "mask", "masked_head", "without_masked_head",
]  # fmt: skip
