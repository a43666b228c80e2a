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

from baselines.safe_lora import projected

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


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
    finetuned: State, models: Models, names: Iterable[str], *, threshold: float = 0.35, weight: float = 0.2
) -> tuple[State, list[str]]:
    """Return the state with some layers merged, and the names of those.

    Args:
        names: the weight matrices, (m, n) each, to look at; whatever else is in the state stays as it is
        threshold: the cosine, -1 to 1, below which a layer is merged; above 1: all are
        weight: of the safety model's update; the fine-tune's has 1 - weight
    """
    found = dict(finetuned)
    changed = projected(finetuned, models.aligned, models.unaligned, names, threshold)[1]
    for name in changed:
        aligned = models.aligned[name]
        update, safe = finetuned[name] - aligned, models.safe[name] - aligned
        found[name] = aligned + (1 - weight) * update + weight * safe
    return found, changed
