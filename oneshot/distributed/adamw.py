"""AdamW for CPUs without temporaries of a weight's size: torch's own arithmetic, on a piece of a weight at a time.

Importing this imports torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

PIECE = 1 << 18  # elements: with its gradient and moments 4 MiB in fp32


class AdamWInPieces(torch.optim.AdamW):
    """``torch.optim.AdamW`` of dense weights, to the same bits.

    torch's loop over weights makes two copies of each in turn: of an embedding of 151,000 words 1 GB, when gradients
    and moments are all there. Every operation is elementwise, so that pieces give the same bits, and sooner: a piece
    stays in the processor's cache from one operation to the next.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here has one
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(group, parameter, parameter.grad)

    def _step_one(self, group: dict[str, Any], parameter: torch.Tensor, gradients: torch.Tensor) -> None:
        state, (beta1, beta2) = moments(self, parameter), group["betas"]
        whole = (parameter, gradients, state["exp_avg"], state["exp_avg_sq"])
        dense = all(tensor.is_contiguous() for tensor in whole)
        for piece in zip(*(tensor.view(-1).split(PIECE) if dense else [tensor] for tensor in whole)):
            weight, gradient, mean, square = ([tensor] for tensor in piece)
            adamw(
                weight, gradient, mean, square, [], [state["step"].clone()],  # the count, which it raises
                foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
        state["step"] += 1


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Return AdamW's state of a parameter (step, exp_avg, exp_avg_sq), made of zeros where there is none yet."""
    state: dict[str, Any] = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
