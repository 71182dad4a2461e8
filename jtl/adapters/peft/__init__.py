"""Reads and writes adapters as PEFT's files: what is trained here opens in ``peft``, and the reverse.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose keys are
``base_model.model.<torch path>.<leaf>``. Supported are LoRA, rsLoRA, DoRA, IA3, VeRA, AdaLoRA, LN tuning, prompts and
prefixes, and the classification head. Checked against PEFT 0.21 (https://github.com/huggingface/peft).
"""

from jtl.adapters.peft.files import CONFIG, PREFIX, WEIGHTS, AdapterFileError
from jtl.adapters.peft.load import load
from jtl.adapters.peft.save import save

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "AdapterFileError", "load", "save"]
