"""Safe LoRA: project the fine-tune's update, layer by layer, onto the directions in which alignment moved the weights.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS 2024
(arXiv 2405.16833). The paper takes the alignment matrix V of a layer as aligned minus unaligned weights, the unaligned
model being the base before alignment. Where there is no such base, as in the toy world, it is the aligned model
fine-tuned on harmful answers (``baselines.unaligned``).

Which layers: those below a threshold (the paper; ``projected``), or the ``SHARE`` of them with the lowest cosine (the
default of the authors' program).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


SHARE = 10 / 64  # the program's default: 10 of the 64 matrices of a Llama-2-7B that its LoRA is on


@dataclass(frozen=True)
class Projection:
    """A layer's update, projected.

    Attributes:
        safe: the projection, (m, n)
        cosine: of the update and it, -1 to 1
    """

    safe: torch.Tensor
    cosine: float


def projection(finetuned: torch.Tensor, aligned: torch.Tensor, unaligned: torch.Tensor) -> Projection:
    """Project one layer's update D = finetuned - aligned, (m, n): P D.

    P is V V^T divided by the Frobenius norm of V = aligned - unaligned, as the paper computes it: the orthogonal
    projector onto the columns of V would be the identity wherever V has full row rank, as the difference of two whole
    checkpoints mostly has.
    """
    import torch

    delta, v = finetuned - aligned, aligned - unaligned
    safe = v @ (v.T @ delta) / v.norm().clamp_min(torch.finfo(v.dtype).tiny)  # where V is 0, so is what is safe
    return Projection(safe, float(torch.cosine_similarity(delta.flatten(), safe.flatten(), dim=0)))


def projected(
    finetuned: State, aligned: State, unaligned: State, names: Iterable[str], threshold: float = 0.35
) -> tuple[State, list[str]]:
    """Return the state with the updates of some layers projected, and the names of those.

    A layer's update becomes its ``projection`` where the cosine of the two is below the threshold.

    Args:
        names: the weight matrices, (m, n) each, to look at; whatever else is in the state stays as it is
        threshold: the cosine, -1 to 1, below which a layer is projected; above 1: all are
    """
    found, changed = dict(finetuned), []
    for name in names:
        made = projection(finetuned[name], aligned[name], unaligned[name])
        if made.cosine < threshold:
            found[name] = aligned[name] + made.safe
            changed.append(name)
    return found, changed
