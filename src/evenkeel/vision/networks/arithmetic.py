"""Says in which arithmetic a machine trains fast."""

from functools import cache
from typing import Any

import torch

__all__ = ["bfloat16_is_fast", "winograd_is_fast"]


@cache
def bfloat16_is_fast(device: str) -> bool:
    """True if convolutions in bfloat16 train faster than in float32 on a `device` of this type: "cpu" or "cuda".

    On a CPU that is so where it multiplies them itself; elsewhere they are emulated. Measured on two cores with AVX-512
    BF16, tile networks of 48 to 336 channels: 1.4 to 2.1 times as many tiles a second.
    """
    if device == "cuda":
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return bool(device == "cpu" and capabilities.get("avx512_bf16", False))


@cache
def winograd_is_fast() -> bool:
    """True if `WinogradConv2d` trains faster on this CPU than PyTorch's own convolution: twice as fast with AVX2.

    With AVX-512 PyTorch's own is 1.2 to 1.6 times as fast (the same networks, on one kind of processor: AMD's).
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX512"
