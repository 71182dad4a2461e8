"""Adapters: parameter-efficient fine-tuning (LoRA and relatives, bottlenecks, prompts, prefixes) of a frozen model.

An adapter is a set of new leaves beside the model's weights. Methods that change weights can be merged into them,
served many at a time (``serve``) and exchanged with PEFT (``peft``).
"""

from jtl.adapters import peft
from jtl.adapters.activation import ActivationAdapter, Bottleneck, LoReFT, bottleneck, loreft
from jtl.adapters.adalora import AdaLoRA, Orthogonality, adalora
from jtl.adapters.allocate import AllocateState, allocate
from jtl.adapters.dora import DoRA, dora
from jtl.adapters.extract import extract
from jtl.adapters.ia3 import IA3, ia3
from jtl.adapters.insert import Adapter, insert, merge
from jtl.adapters.lora import LoRA, lora
from jtl.adapters.method import LowRank, Method, Scaling
from jtl.adapters.prefix import Prefix, prefix
from jtl.adapters.product import LoHa, LoKr, loha, lokr
from jtl.adapters.prompt import Prompt, prompt
from jtl.adapters.reparametrise import Reparametrised, reparametrise
from jtl.adapters.serve import PerRow, pick, serve, swap
from jtl.adapters.site import Site, SiteError, find
from jtl.adapters.vera import VeRA, vera

__all__ = [
    "ActivationAdapter", "AdaLoRA", "Adapter", "AllocateState", "Bottleneck", "DoRA", "IA3", "LoHa", "LoKr",
    "LoRA", "LoReFT", "LowRank", "Method", "Orthogonality", "PerRow", "Prefix", "Prompt", "Reparametrised",
    "Scaling", "Site", "SiteError", "VeRA",
    "adalora", "allocate", "bottleneck", "dora", "extract", "find", "ia3", "insert", "loha", "lokr", "lora",
    "loreft", "merge", "peft", "pick", "prefix", "prompt", "reparametrise", "serve", "swap", "vera",
]  # fmt: skip
