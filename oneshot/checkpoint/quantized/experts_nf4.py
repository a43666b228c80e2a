"""Fused experts in 4 bits: packed as the whole parameter is, and dequantized one expert at a time.

Nothing of bitsandbytes holds such a parameter. It is one flat tensor of packed nibbles with one scale per block of 64
weights, as of a linear layer; an expert's matrix fills whole blocks, so that it is a range of both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import PROJECTIONS, fused_experts
from oneshot.checkpoint.quantized.unpack import dequantized

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 64  # weights per scale, as of linear layers
_NESTED = 256  # scales per second scale


def pack_experts(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple[Any, str]]:
    """Give fused experts packed parameters, without values.

    Returns:
        parameter's name -> (module, projection), of those whose experts' matrices fill whole blocks
    """
    found = {}
    for path, module in fused_experts(model).items():
        for projection in PROJECTIONS:
            parameter = module._parameters.get(projection)
            if parameter is not None and parameter.dim() == 3 and is_packable(tuple(parameter.shape)):
                module._parameters[projection] = packed_experts(tuple(parameter.shape), dtype, "meta")
                found[f"{path}.{projection}"] = (module, projection)
    return found


def is_packable(shape: tuple[int, ...]) -> bool:
    """Return whether the matrices of a parameter of experts fill whole blocks each."""
    return math.prod(shape[1:]) % BLOCK == 0


def packed_experts(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> nn.Parameter:
    """Return a parameter for packed experts, (packed elements, 1), but one element of memory; it keeps ``shape``."""
    import torch

    data = torch.zeros((), dtype=dtype, device=device).expand(math.prod(shape) // (2 * dtype.itemsize), 1)
    parameter: Any = torch.nn.Parameter(data, requires_grad=False)
    parameter.unpacked_shape = shape
    return parameter  # type: ignore[no-any-return]


def expert_weight(parameter: Any, index: int, *, transposed: bool) -> torch.Tensor:
    """Return one expert's matrix as it multiplies, (m, n), whether it is held in 4 bits or not.

    Args:
        parameter: of all experts, gathered
        transposed: whether it holds (n, m)
    """
    held = held_matrix(parameter, index)
    return held.T if transposed else held


def held_matrix(parameter: Any, index: int) -> torch.Tensor:
    """Return one expert's matrix as the parameter holds it; of a packed parameter in the dtype that it computes in."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter[index]  # type: ignore[no-any-return]
    import torch
    from bitsandbytes.functional import QuantState

    shape = tuple(state.shape[1:])
    numel = math.prod(shape)
    first, last = index * numel // BLOCK, (index + 1) * numel // BLOCK
    packed = parameter.data.reshape(-1).view(torch.uint8)[index * numel // 2 : (index + 1) * numel // 2]
    own = QuantState(
        absmax=_scales(state, first, last), shape=torch.Size(shape), dtype=state.dtype, blocksize=BLOCK,
        code=state.code, quant_type="nf4",
    )  # fmt: skip
    return dequantized(packed, own)


def _scales(state: Any, first: int, last: int) -> torch.Tensor:
    """Scales ``first`` to ``last`` of a packed parameter, fp32: of quantized ones the blocks around them, unpacked."""
    if not state.nested:
        return state.absmax[first:last]  # type: ignore[no-any-return]
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    low, high = first // _NESTED, -(-last // _NESTED)
    second = state.state2
    around = QuantState(
        absmax=second.absmax[low:high], code=second.code, blocksize=_NESTED, dtype=second.dtype,
    )  # fmt: skip
    found: torch.Tensor = dequantize_blockwise(state.absmax[low * _NESTED : high * _NESTED], around) + state.offset
    return found[first - low * _NESTED : last - low * _NESTED].float()
