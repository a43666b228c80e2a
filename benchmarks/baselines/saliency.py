"""Gradient-saliency patch: train only the few weights that matter most for refusing the one example.

Saliency is |weight * gradient|, the connection sensitivity of SNIP (Lee, Ajanthan and Torr, arXiv 1810.02340), with
which Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications" (arXiv
2402.05162), find the weights that carry safety; or the gradient's size alone. The top 5% are then trained with Adam. It
needs the one example and nothing else: no aligned model, no guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def patch_salient(
    model: Any,
    loss_of: Callable[[Any], torch.Tensor],
    names: Iterable[str],
    *,
    share: float = 0.05,
    steps: int = 10,
    learning_rate: float = 1e-4,
    weighed: bool = True,
) -> int:
    """Train the model's most salient weights in place; return how many there are.

    Weights are ranked over all named matrices together, once, before the first step; the loss is evaluated
    ``steps`` + 1 times.

    Args:
        loss_of: the example's loss, of the model
        names: the parameters that may be trained
        share: of their elements, how many are, above 0 to 1
        steps, learning_rate: of Adam
        weighed: saliency is |weight * gradient|; otherwise |gradient|
    """
    import torch

    chosen = {name: model.get_parameter(name) for name in names}
    parameters = list(chosen.values())
    gradients = torch.autograd.grad(loss_of(model), parameters)
    saliency = [(p.detach() * g if weighed else g).abs() for p, g in zip(parameters, gradients)]
    count: int = max(1, round(share * sum(p.numel() for p in parameters)))
    top = torch.cat([s.flatten() for s in saliency]).topk(count).indices
    flat = torch.zeros(sum(s.numel() for s in saliency), dtype=torch.bool, device=top.device)
    flat[top] = True
    masks = [part.view_as(s) for part, s in zip(flat.split([s.numel() for s in saliency]), saliency)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        gradients = torch.autograd.grad(loss_of(model), parameters)
        for parameter, gradient, mask in zip(parameters, gradients, masks):
            parameter.grad = gradient * mask  # Adam leaves a weight whose gradient was always 0 where it is
        optimizer.step()
    optimizer.zero_grad()
    return count
