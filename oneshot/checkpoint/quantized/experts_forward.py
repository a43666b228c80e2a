"""Fused experts computed one after the other: what is hooked on sees each, and 4-bit ones are unpacked one at a time.

transformers lets a model's experts be computed by any function that is registered with it. Ours does what their own
do, expert by expert and only those that a token is sent to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from oneshot.checkpoint.quantized.experts_nf4 import expert_weight

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAME = "oneshot"

# (name of the matrix, its input (rows, n), its output (rows, m), which of the tokens, laid end to end, these rows are,
# int64 (rows,), rising) -> another output, or none; of a layer to which every token goes there are no such rows
Hook = Callable[[str, "torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor | None"]

HOOKS: WeakKeyDictionary[nn.Module, list[tuple[str, Hook]]] = WeakKeyDictionary()  # with the experts' path, each


@functools.cache
def one_by_one_name() -> str:
    """Return the name by which a config asks for ``one_by_one``, having registered it with transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, one_by_one)
    return _NAME


def one_by_one(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' weighted sum, (tokens, hidden), as transformers' own functions do; arguments are theirs.

    Args:
        module: the fused experts
        hidden_states: (tokens, hidden)
        top_k_index: int64 (tokens, k), the experts that each token is sent to
        top_k_weights: (tokens, k)
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
    for index, (x, at) in enumerate(zip(hidden_states[rows].split(counts), rows.split(counts))):
        if not len(x):
            continue
        inner = _matrix(module, (first, upper), index, x, at)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = _matrix(module, ("down_proj", lower), index, inner, at)
        found.append(module.post_expert_norm(y) if module.has_post_expert_norm else y)
    weighted = torch.cat(found) * top_k_weights.flatten()[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # a token's outputs side by side: added up in one order, whatever the device
    return weighted[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _matrix(module: Any, of: tuple[str, Any], index: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One expert's (rows, n) -> (rows, m), with its bias and what is hooked on.

    Args:
        of: projection and its parameter
    """
    from torch.nn.functional import linear

    projection, parameter = of
    bias = getattr(module, f"{projection}_bias")[index] if module.has_bias else None
    if parameter.requires_grad:
        y = linear(x, expert_weight(parameter, index, transposed=module.is_transposed), bias)
    else:
        y = _frozen_linear().apply(x, parameter, index, module.is_transposed)
        y = y if bias is None else y + bias
    for path, hook in HOOKS.get(module, ()):
        other = hook(f"{path}.{index}.{projection}", x, y, rows)
        y = y if other is None else other
    return y


@functools.cache
def _frozen_linear() -> Any:
    """x W^T of one expert's matrix, of which autograd keeps the parameter and no view.

    A view would keep all experts' weights, gathered for the forward pass (ZeRO-3), until backward comes to the layer,
    and of 4-bit ones each unpacked; the parameter is gathered for backward again.
    """
    import torch

    class FrozenLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, parameter: torch.Tensor, index: int, transposed: bool) -> torch.Tensor:
            ctx.of = parameter, index, transposed
            return torch.nn.functional.linear(x, expert_weight(parameter, index, transposed=transposed))

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
            parameter, index, transposed = ctx.of
            return gradient @ expert_weight(parameter, index, transposed=transposed), None, None, None

    return FrozenLinear
