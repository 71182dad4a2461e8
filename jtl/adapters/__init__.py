"""Adapters: parameter-efficient fine-tuning as leaves beside a frozen model's weights."""

from jtl.adapters import peft
from jtl.adapters.activation import ActivationAdapter, Bottleneck, LoReFT, bottleneck, loreft
from jtl.adapters.dora import DoRA, dora
from jtl.adapters.extract import extract
from jtl.adapters.ia3 import IA3, ia3
from jtl.adapters.insert import Adapter, insert, merge
from jtl.adapters.lora import LoRA, lora
from jtl.adapters.method import LowRank, Method
from jtl.adapters.product import LoHa, LoKr, loha, lokr
from jtl.adapters.site import Site, SiteError, find
from jtl.adapters.vera import VeRA, vera

__all__ = [
    "ActivationAdapter", "Adapter", "Bottleneck", "DoRA", "IA3", "LoHa", "LoKr", "LoRA", "LoReFT", "LowRank", "Method",
    "Site", "SiteError", "VeRA",
    "bottleneck", "dora", "extract", "find", "ia3", "insert", "loha", "lokr", "lora", "loreft", "merge", "peft", "vera",
]  # fmt: skip
