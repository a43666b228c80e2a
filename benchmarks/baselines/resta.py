"""RESTA: add a safety vector to the fine-tuned weights.

Bhardwaj, Do and Poria, "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through
Task Arithmetic", ACL 2024 (arXiv 2402.11746). Both variants are here: the plain sum, and the one that first thins the
fine-tune's own update (drop and rescale, "DARE": Yu et al., arXiv 2311.03099).

It needs the aligned model and an unaligned one, which the paper makes by fine-tuning the aligned model on harmful
answers; ``baselines.unaligned`` does so on the toy world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


def with_safety_vector(
    finetuned: State, aligned: State, unaligned: State, alpha: float = 1.0, *, drop: float = 0.0, seed: int = 0
) -> State:
    """Return finetuned + alpha * (aligned - unaligned), for every weight.

    Args:
        alpha: scale of the safety vector
        drop: chance that an element of the fine-tune's update (finetuned - aligned) is dropped, 0 to below 1; the
            others are divided by 1 - drop
        seed: of what is dropped
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in finetuned.items():
        reference = aligned[name]
        if drop:
            kept = torch.rand(weight.shape, generator=generator).to(weight.device) >= drop
            weight = reference + (weight - reference) * kept / (1 - drop)
        found[name] = weight + alpha * (reference - unaligned[name])
    return found
