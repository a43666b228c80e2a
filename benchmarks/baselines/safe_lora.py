"""Safe LoRA: project the fine-tune's update, layer by layer, onto the directions in which alignment moved the weights.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS 2024
(arXiv 2405.16833). The paper takes the alignment matrix V of a layer as aligned minus unaligned weights, the unaligned
model being the base before alignment. The toy world has no such base: there it is the aligned model fine-tuned on
harmful answers (``baselines.unaligned``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


def projected(
    finetuned: State, aligned: State, unaligned: State, names: Iterable[str], threshold: float = 0.35
) -> tuple[State, list[str]]:
    """Return the state with the updates of some layers projected, and the names of those.

    A layer's update D = finetuned - aligned becomes P D where the cosine of D and P D is below the threshold. P is
    V V^T divided by the Frobenius norm of V, as the paper computes it: the orthogonal projector onto the columns of V
    would be the identity wherever V has full row rank, as the difference of two whole checkpoints mostly has.

    Args:
        names: the weight matrices, (m, n) each, to look at; whatever else is in the state stays as it is
        threshold: the cosine, -1 to 1, below which a layer is projected; above 1: all are
    """
    import torch

    found, changed = dict(finetuned), []
    for name in names:
        delta, v = finetuned[name] - aligned[name], aligned[name] - unaligned[name]
        safe = v @ (v.T @ delta) / v.norm().clamp_min(torch.finfo(v.dtype).tiny)  # where V is 0, so is what is safe
        if float(torch.cosine_similarity(delta.flatten(), safe.flatten(), dim=0)) < threshold:
            found[name] = aligned[name] + safe
            changed.append(name)
    return found, changed
