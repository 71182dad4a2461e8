"""Building blocks that the architectures share: attention, layers, rotary positions, caches and stacked layers."""

from jtl.models.parts.attention import Attention

__all__ = ["Attention"]
