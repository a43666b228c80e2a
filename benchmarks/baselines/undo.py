"""Undo the fine-tune: put the aligned model's linear layers back, and lose the task that they learnt with the damage.

What the fine-tune wrote into embeddings, norms and output head stays, and it can carry much of the damage: on the toy
world a full fine-tune leaves unsafe models behind even so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]


def undone(finetuned: State, aligned: State, names: Iterable[str]) -> State:
    """Return the fine-tuned state with the named weights of the aligned one; the others stay as they are."""
    return finetuned | {name: aligned[name].clone() for name in names}
