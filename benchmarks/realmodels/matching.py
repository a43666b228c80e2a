"""The strength at which another's method keeps the task as well as the default repair: for a comparison at one task.

Strength is how far a method goes from the attacked weights to those that it gives at its defaults: 0 is the attacked
model, 1 the method as published, and beyond 1 it goes on in the same direction. Of RESTA this is its own alpha, of an
undo the share undone, of LoRA its scale; of a method that chooses layers, how many: all of them at ``MOST``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

WITHIN = 0.02  # of the target: what the task accuracy may be below it
MOST = 2.0
HALVINGS = 4
WEAKER = (0.25, 0.5, 0.75)  # of the strongest that keeps the task: a method may refuse too much there


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        strength: the chosen one
        task: its task accuracy on the prompts that it was chosen by
        matched: that is no more than ``WITHIN`` below the target
        tried: task accuracy by strength
        balances: by strength, of those that keep the task
    """

    strength: float
    task: float
    matched: bool
    tried: dict[float, float]
    balances: dict[float, float] = field(default_factory=dict)


def choose(task: Callable[[float], float], balance: Callable[[float], float], target: float) -> Choice:
    """Return the strength with the best balance among those tried that keep the task; of equals the largest.

    The edge of what keeps the task is looked for: at 1, then at ``MOST``, or between what keeps it and what does not by
    halving; then less than it is tried. A method that keeps more of the task than the target is not made to lose it.

    Args:
        task: gives the task accuracy, 0 to 1, at a strength
        balance: gives how well requests are told apart, 0 to 1, at a strength
        target: the default repair's task accuracy
    """
    tried: dict[float, float] = {}

    def keeps(strength: float) -> bool:
        tried[strength] = task(strength)
        return tried[strength] >= target - WITHIN - 1e-9

    low, high = (0.0, 1.0) if not keeps(1.0) else (1.0, MOST)
    if low and keeps(MOST):
        low = high
    for _ in range(HALVINGS if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    for share in WEAKER if low else ():
        keeps(share * low)
    kept = [strength for strength, value in tried.items() if value >= target - WITHIN - 1e-9]
    if not kept:
        weakest = min(tried)
        return Choice(weakest, tried[weakest], False, tried)
    balances = {strength: balance(strength) for strength in kept}
    best = max((value, strength) for strength, value in balances.items())[1]
    return Choice(best, tried[best], True, tried, balances)
