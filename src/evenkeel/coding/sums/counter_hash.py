"""Draws random numbers without a generator: by a hash of a counter and a key.

Every number depends on its own counter only, so any part of a vector can be coded anywhere, in any order and by any
kernel, and comes out the same. All arithmetic is on 32-bit words that wrap. Torch has no unsigned arithmetic worth the
name, so here words live in int64; both multipliers are below 2**31, which keeps every product below 2**63.
"""

from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Stream", "counters", "key", "mix", "signs", "uniform"]

Word = TypeVar("Word", int, Tensor)
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: moves the all-zero word, which `mix` would leave where it is


class Stream(IntEnum):
    """Says what random numbers are for: the last word of a key, so that each use has a stream of its own."""

    SIGNS = 1
    STRATA = 2
    ORDER = 3
    PRIVATE = 4
    BASIS = 5


def mix(word: Word) -> Word:
    """Scrambles a 32-bit word one to one: every bit in changes every bit out with probability close to 1/2.

    Source: xor-shift-multiply with the multipliers that hash-prospector (C. Wellons) found least biased.
    """
    word = (word ^ (word >> 16)) * 0x21F0AAAD & _MASK
    word = (word ^ (word >> 15)) * 0x735A2D97 & _MASK
    return word ^ (word >> 15)


def key(*words: int) -> int:
    """Makes one 32-bit key of whole numbers of up to 64 bits."""
    folded = 0
    for word in words:
        for part in (word & _MASK, word >> 32 & _MASK):
            folded = mix((folded ^ part) + _GOLDEN & _MASK)
    return folded


def counters(length: int, device: torch.device) -> Tensor:
    """Counts 0, 1, ..., length - 1, as words."""
    return torch.arange(length, dtype=torch.int64, device=device)


def uniform(words: Tensor) -> Tensor:
    """Gives the upper 24 bits of each word as float32 in [0, 1); all of them are exact."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def signs(length: int, secret: int, device: torch.device) -> Tensor:
    """Draws signs, float32 +1 or -1 `[length]`: bit i % 32 of word i // 32 is 1 where sign i is minus."""
    words = mix(counters(-(-length // 32), device) + secret & _MASK)
    bits = words[:, None] >> counters(32, device) & 1
    return (1 - 2 * bits).view(-1)[:length].to(torch.float32)
