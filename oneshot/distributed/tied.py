"""The gradient of a weight that is both the embedding and the output head, without copies of it.

autograd makes three of it: the head's, the embedding's (zeros but for the rows of the batch's tokens) and their sum,
which is 1.5 GB for 151,000 words of width 896. Here the embedding's rows are added to the head's gradient in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def accumulate_rows(model: nn.Module) -> None:
    """Have backward passes of ``model`` add to the gradient of a tied embedding in place, to the same bits on a CPU.

    For a model whose gradients are this process's alone. Nothing changes where embedding and head are not tied, or the
    embedding is more than a lookup.
    """
    import torch
    from torch import nn

    named = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    lookup, head = (get() if get is not None else None for get in named)
    if type(lookup) is not nn.Embedding or lookup.weight is not getattr(head, "weight", None):
        return
    if lookup.max_norm is not None or lookup.scale_grad_by_freq or lookup.sparse:
        return

    def apart(module: nn.Embedding, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not args or not (module.weight.requires_grad and torch.is_grad_enabled()):
            return None
        rows, ids = output.detach().requires_grad_(), args[0]
        rows.register_post_accumulate_grad_hook(lambda found: _add_rows(module, ids, found))
        return rows.clone()  # a model may write into what it looked up, which a leaf does not allow

    lookup.register_forward_hook(apart)


def _add_rows(lookup: nn.Embedding, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Add gradients at looked-up rows to the weight's, which the head has left by now.

    Those of one token are summed first, in their order, as the embedding's own backward pass does.
    """
    import torch

    weight, gradients = lookup.weight, rows.grad
    assert gradients is not None
    ids, gradients = ids.flatten(), gradients.flatten(0, -2)
    rows.grad = None
    if lookup.padding_idx is not None:
        taken = ids != lookup.padding_idx
        ids, gradients = ids[taken], gradients[taken]
    tokens, where = ids.unique(return_inverse=True)
    sums = gradients.new_zeros(len(tokens), gradients.shape[-1]).index_add_(0, where, gradients)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.index_add_(0, tokens, sums.to(weight.grad.dtype))
