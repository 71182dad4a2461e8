"""Pretrained models: find and load them, read their tokenizers and image settings, and save models for Hugging Face."""

from jtl.pretrained.load import Report, WeightsError, load, load_with_report, scratch
from jtl.pretrained.processor import image_processor
from jtl.pretrained.save import check_savable, save
from jtl.pretrained.sources import SHORT_NAMES, UnknownModelError, UnreachableHubError, resolve
from jtl.pretrained.tokenize import tokenizer

__all__ = [
    "SHORT_NAMES",
    "Report",
    "UnknownModelError",
    "UnreachableHubError",
    "WeightsError",
    "check_savable",
    "image_processor",
    "load",
    "load_with_report",
    "resolve",
    "save",
    "scratch",
    "tokenizer",
]
