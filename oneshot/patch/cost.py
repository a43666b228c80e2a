"""What a repair method costs, as facts that the planner reckons with: no figure here depends on a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cost:
    """What a method holds and computes.

    Attributes:
        trains: what an optimizer steps in the training loop: the weights, a LoRA adapter, or nothing. Of nothing, the
            weights stay frozen, and the update is held as low-rank factors in fp32
        moments: numbers that the optimizer keeps of each trained parameter, beside it and its gradient (AdamW: 2)
        factors: generations of (inputs, output gradients) of every linear layer that are held at a time; none: 0
        guard_gradient: the guard's rows are part of what a gradient is taken of, not of forward passes alone
        backward: an epoch takes a gradient; without, it is a forward pass
        extra_passes: passes beside those that the epochs count
        turns: an epoch takes some of a guard with many prompts (``oneshot.patch.guard.AT_ONCE``), in turn all
        decomposes: the fine-tune's update is read from the reference and decomposed, a matrix at a time
    """

    trains: Literal["nothing", "adapter", "weights"] = "nothing"
    moments: int = 0
    factors: int = 0
    guard_gradient: bool = True
    backward: bool = True
    extra_passes: int = 0
    turns: bool = False
    decomposes: bool = False
