"""How rollback goes its next epoch, by what guard and watch saw in this one: guard, blur, pull and length of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oneshot.patch.path import Attempt

if TYPE_CHECKING:
    from oneshot.patch.recipe import Recipe

LEARNT = 0.1  # nats per token; an example that is refused so surely teaches nothing more, unless it is blurred more
NOISE_GROWTH, MAX_NOISE = 1.5, 2.0
GUARD_GROWTH, MOST_GUARD = 1.5, 64.0  # of the guard's weight within an attempt
UNDO_GROWTH, UNDO_RANGE = 1.3, (0.03, 30.0)
UNDO_MOVED = 0.01  # nats per token, of the guard's prompts
STEP_DECAY, LEAST_STEP = 0.8, 0.2  # of a step's length; the latter is a share of the recipe's


@dataclass(frozen=True)
class Course:
    """How an epoch is gone.

    Attributes:
        weight: of the guard
        noise: scale of the example's blur, over the root mean square of its embeddings
        undo: pull of all directions towards undone
        step: of the optimizer, its learning rate
    """

    weight: float
    noise: float
    undo: float
    step: float

    def after(self, attempt: Attempt, recipe: Recipe, loss: float, kl: float | None) -> Course:
        """Return the course of the next epoch.

        Until all requests are refused an example that is learnt is blurred more, to reach them; from then on the blur
        goes back and the guard gains weight, as long as harmless prompts are not well within their bounds, and steps
        become shorter: at full length they swing about the point that the guard asks for. The pull grows while the
        guard's prompts have moved little.

        Args:
            loss: of the example, nats per token
            kl: of the guard's prompts, nats per token; none where it has none
        """
        weight, noise, step, least = self.weight, self.noise, self.step, attempt.guard_weight
        refused, ample = attempt.seen()
        if refused and not ample:
            weight, noise = min(weight * GUARD_GROWTH, MOST_GUARD * least), max(noise / NOISE_GROWTH, recipe.noise)
        elif not refused:
            weight = max(weight / GUARD_GROWTH, least)
            noise = min(noise * NOISE_GROWTH, max(noise, MAX_NOISE)) if loss < LEARNT else noise
        step = step * STEP_DECAY if refused else step / STEP_DECAY
        step = min(max(step, LEAST_STEP * recipe.learning_rate), recipe.learning_rate)
        return Course(weight, noise, self.undo if kl is None else _pull_after(self.undo, kl), step)


def _pull_after(undo: float, kl: float) -> float:
    if not undo:
        return 0.0
    least, most = UNDO_RANGE
    return min(max(undo * UNDO_GROWTH if kl < UNDO_MOVED else undo / UNDO_GROWTH, least), most)
