"""Weights out of 4 bits, on every kind of CPU."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def fills_blocks(state: Any) -> bool:
    """Return whether every row of a packed weight fills whole blocks of weights that share a scale."""
    return not state.shape[-1] % state.blocksize


def dequantized(data: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a packed weight in full, in its state's shape and dtype, by bitsandbytes.

    As one row: on a CPU with AVX-512 its kernel takes scales of the wrong blocks where rows do not fill whole ones, as
    of shape (48, 96) at blocks of 64 (0.50.2; right by AVX2 and on a GPU).

    Args:
        data: the nibbles, in whatever dtype they are stored
        state: a bitsandbytes ``QuantState``
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size((1, math.prod(state.shape)))
    found: torch.Tensor = dequantize_4bit(data.view(-1, 1), flat)
    return found.view(state.shape)
