"""SafeMERGE: merge the layers that left the alignment subspace with those of a model that was trained to be safe.

Djuhera, Kadhe, Ahmed, Zawad and Boche, "SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via
Selective Layer-Wise Model Merging" (arXiv 2503.17239). A layer is judged as in Safe LoRA, by the cosine of its update
and the update's projection; one below the threshold becomes a weighted sum of the fine-tune's update and that of a
"safety model", which is the aligned one fine-tuned on requests with refusals. Threshold and weights are those of the
models that the authors published (0.35; 0.8 and 0.2).

Our reading: the paper merges LoRA adapters. Here updates are whole matrices, so that full fine-tunes can be repaired,
and it is the updates that are summed, not their factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baselines.safe_lora import projection

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


THRESHOLD, WEIGHT = 0.35, 0.2


@dataclass(frozen=True)
class Models:
    """States of the same architecture.

    Attributes:
        aligned: before the fine-tune
        unaligned: the aligned one without its alignment
        safe: the aligned one, fine-tuned on refusals
    """

    aligned: State
    unaligned: State
    safe: State


def merged(
    finetuned: State, models: Models, names: Iterable[str], *, threshold: float = THRESHOLD, weight: float = WEIGHT
) -> tuple[State, list[str]]:
    """Return the state with some layers merged, and the names of those.

    Args:
        names: the weight matrices, (m, n) each, to look at; whatever else is in the state stays as it is
        threshold: the cosine, -1 to 1, below which a layer is merged; above 1: all are
        weight: of the safety model's update; the fine-tune's has 1 - weight
    """
    cosines = {name: projection(finetuned[name], models.aligned[name], models.unaligned[name]).cosine for name in names}
    changed = [name for name, cosine in cosines.items() if cosine < threshold]
    return dict(finetuned) | {name: summed(finetuned, models, name, weight) for name in changed}, changed


def summed(finetuned: State, models: Models, name: str, weight: float = WEIGHT) -> torch.Tensor:
    """Return one layer merged: (m, n)."""
    aligned = models.aligned[name]
    return aligned + (1 - weight) * (finetuned[name] - aligned) + weight * (models.safe[name] - aligned)
