"""Fused experts computed one after the other: what is hooked on sees each, and 4-bit ones are unpacked one at a time.

transformers lets a model's experts be computed by any function that is registered with it. Ours does what their own
do, expert by expert and only those that a token is sent to. Llama-4's are behind no such interface: the forward
function of each of its modules is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from oneshot.checkpoint.adapters.experts import computes_all_at_once, is_transposed
from oneshot.checkpoint.quantized.experts_nf4 import expert_weight

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAME = "oneshot"

# (name of the matrix, its input (rows, n), its output (rows, m), which of the tokens, laid end to end, these rows are,
# int64 (rows,), rising) -> another output, or none; of a layer to which every token goes there are no such rows
Hook = Callable[[str, "torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor | None"]

HOOKS: WeakKeyDictionary[nn.Module, list[tuple[str, Hook]]] = WeakKeyDictionary()  # with the experts' path, each


def compute_one_by_one(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Have the experts of these modules computed one after the other; return what has them computed as before."""
    every = list(modules)
    at_once = {module: module.__dict__.get("forward") for module in every if computes_all_at_once(module)}
    configs: dict[int, Any] = {id(module.config): module.config for module in every if module not in at_once}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = _registered()
    for module in at_once:
        module.forward = functools.partial(_each_with_its_own, module)

    def undo() -> None:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        for module, own in at_once.items():
            del module.forward
            if own is not None:
                module.forward = own

    return undo


@functools.cache
def _registered() -> str:
    """The name by which a config asks for ``one_by_one``, which is registered with transformers."""
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


def _each_with_its_own(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the outputs of Llama-4's experts, (experts * tokens, hidden), as its own function does.

    Args:
        hidden_states: (experts * tokens, hidden), every token for each expert; of a token that is not sent to an expert
            all elements are 0 there, and so is its output
    """
    import torch

    upper, lower = module.gate_up_proj, module.down_proj
    found = []
    for index, given in enumerate(hidden_states.view(module.num_experts, -1, module.hidden_size)):
        rows = given.ne(0).any(dim=-1).nonzero().flatten()
        y = torch.zeros_like(given)
        if len(rows):
            gate, up = _matrix(module, ("gate_up_proj", upper), index, given[rows], rows).chunk(2, dim=-1)
            y = y.index_copy(0, rows, _matrix(module, ("down_proj", lower), index, up * module.act_fn(gate), rows))
        found.append(y)
    return torch.cat(found)


def _matrix(module: Any, of: tuple[str, Any], index: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One expert's (rows, n) -> (rows, m), with its bias and what is hooked on.

    Args:
        of: projection and its parameter
    """
    from torch.nn.functional import linear

    projection, parameter = of
    transposed = is_transposed(module)
    bias = getattr(module, f"{projection}_bias")[index] if getattr(module, "has_bias", False) else None
    if parameter.requires_grad:
        y = linear(x, expert_weight(parameter, index, transposed=transposed), bias)
    else:
        y = _frozen_linear().apply(x, parameter, index, transposed)
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
