"""Fused experts in 4 bits: packed as the whole parameter is, and dequantized one expert at a time.

Nothing of bitsandbytes holds such a parameter. It is one flat tensor of packed nibbles with one scale per block of 64
weights, as of a linear layer; an expert's matrix fills whole blocks, so that it is a range of both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.experts import PROJECTIONS, fused_experts

if TYPE_CHECKING:
    import torch
    from torch import nn

# (projection, expert, input (rows, n), output (rows, m), which of the tokens these rows are, int64 (rows,), rising) ->
# the output to go on with
At = Callable[[str, int, "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]

IMPLEMENTATION = "oneshot_nf4"  # the name by which transformers knows our function
BLOCK = 64  # weights per scale, as of linear layers
_NESTED = 256  # scales per second scale


def pack_experts(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple[nn.Module, str]]:
    """Give fused experts packed parameters, without values, and have the model compute with these.

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
                config: Any = module.config
                config._experts_implementation = _registered()
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


def expert_weight(module: nn.Module, projection: str, index: int) -> torch.Tensor:
    """Return one expert's matrix as it multiplies, (m, n), whether it is held in 4 bits or not.

    Args:
        module: the fused experts, their parameters gathered
        projection: name of the parameter
    """
    held = held_matrix(getattr(module, projection), index)
    return held.T if bool(module.is_transposed) else held


def held_matrix(parameter: Any, index: int) -> torch.Tensor:
    """Return one expert's matrix as the parameter holds it; of a packed parameter in the dtype that it computes in."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter[index]  # type: ignore[no-any-return]
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = tuple(state.shape[1:])
    numel = math.prod(shape)
    first, last = index * numel // BLOCK, (index + 1) * numel // BLOCK
    packed = parameter.data.reshape(-1).view(torch.uint8)[index * numel // 2 : (index + 1) * numel // 2]
    own = QuantState(
        absmax=_scales(state, first, last), shape=torch.Size(shape), dtype=state.dtype, blocksize=BLOCK,
        code=state.code, quant_type="nf4",
    )  # fmt: skip
    found: torch.Tensor = dequantize_4bit(packed.view(-1, 1), own)
    return found


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


@functools.cache
def _registered() -> str:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward_one_by_one)
    return IMPLEMENTATION


def forward_one_by_one(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    at: At | None = None,
) -> torch.Tensor:
    """Return the experts' weighted sum, (tokens, hidden), as transformers' own functions do; arguments are theirs.

    Only experts that a token is sent to are computed.

    Args:
        module: the fused experts, each projection packed or not
        hidden_states: (tokens, hidden)
        top_k_index: int64 (tokens, k), the experts that each token is sent to
        top_k_weights: (tokens, k)
        at: called at every matrix; its output is the next one's input
    """
    import torch

    tokens, k = top_k_index.shape
    sent = top_k_index.flatten()
    order = sent.argsort(stable=True)  # expert after expert
    counts = torch.bincount(sent, minlength=module.num_experts).tolist()
    rows = order // k
    first = "gate_up_proj" if module.has_gate else "up_proj"
    # once: whoever trains a LoRA of a parameter makes it anew whenever it is asked for
    upper, lower = getattr(module, first), module.down_proj
    found = []
    for index, (x, own) in enumerate(zip(hidden_states[rows].split(counts), rows.split(counts))):
        if not len(x):
            continue
        inner = _linear(module, first, upper, index, x)
        inner = inner if at is None else at(first, index, x, inner, own)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = _linear(module, "down_proj", lower, index, inner)
        y = y if at is None else at("down_proj", index, inner, y, own)
        found.append(module.post_expert_norm(y) if module.has_post_expert_norm else y)
    weighted = torch.cat(found) * top_k_weights.flatten()[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # a token's outputs side by side: added up in one order, whatever the device
    return weighted[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _linear(module: Any, projection: str, parameter: Any, index: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's (rows, n) -> (rows, m), with its bias."""
    import torch

    if parameter.requires_grad:
        y = torch.nn.functional.linear(x, parameter[index].T if module.is_transposed else parameter[index])
    else:
        y = _product().apply(x, parameter, index, module.is_transposed)
    return y + getattr(module, f"{projection}_bias")[index] if module.has_bias else y


@functools.cache
def _product() -> Any:
    """The product with one frozen expert's matrix, of which autograd keeps the parameter and nothing else.

    What is unpacked would be held until backward, and a view would hold all experts' weights that were gathered for the
    forward pass (ZeRO-3): they are unpacked, or gathered, for backward again.
    """
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, parameter: Any, index: int, transposed: bool) -> torch.Tensor:
            ctx.of = parameter, index, transposed
            weight = held_matrix(parameter, index).to(x.dtype)
            return x @ weight if transposed else x @ weight.T

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            parameter, index, transposed = ctx.of
            (gradient,) = gradients
            weight = held_matrix(parameter, index).to(gradient.dtype)
            return gradient @ (weight.T if transposed else weight), None, None, None

    return Product
