"""The product of a 4-bit linear layer whose packed weight may be partitioned (ZeRO-3)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.quantized.unpack import dequantized, fills_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn


def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``Linear4bit.forward`` for partitioned weights.

    Rows are flattened: for more dimensions the linear function that DeepSpeed puts in place of torch's, which
    bitsandbytes calls on a CPU, adds the bias in a second step and rounds twice.
    """
    rows = x.to(module.compute_dtype).flatten(0, -2)
    y: torch.Tensor = _product().apply(rows, module.weight, module.bias, module.quant_state)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


@functools.cache
def _product() -> Any:
    """The product with a 4-bit weight as an autograd function that holds the parameter, not what it holds now.

    bitsandbytes' own keeps a view of the gathered weight from the forward to the backward pass: every layer would
    stay gathered. The parameter is gathered anew before its layer's backward pass.
    """
    import torch
    from bitsandbytes import matmul_4bit

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: Any, state: Any) -> torch.Tensor:
            ctx.weight, ctx.state = weight, state
            if x.device.type == "cpu" and not fills_blocks(state):  # see there
                return torch.nn.functional.linear(x, dequantized(weight.data, state).to(x.dtype), bias)
            product: torch.Tensor = matmul_4bit(x, weight.data, quant_state=state, bias=bias)
            return product

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            weight = dequantized(ctx.weight.data, ctx.state).to(gradient.dtype)
            return gradient @ weight, None, None, None

    return Product
