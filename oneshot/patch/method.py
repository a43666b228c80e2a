"""What a repair method is: one frozen value, held beside its function in ``oneshot/patch/methods/``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from oneshot.patch.cost import Cost

if TYPE_CHECKING:
    from oneshot.checkpoint.adapters.update import Update
    from oneshot.patch.bench import Bench
    from oneshot.patch.guard import RepairBatch
    from oneshot.patch.path import Attempt

    Solve = Callable[[Bench, RepairBatch, Attempt], Generator[Update, None, tuple[Update, dict[str, Any]]]]
    Prepare = Callable[[Bench], dict[str, Any]]

Ended = TypeVar("Ended")


def finished(path: Generator[Any, None, Ended]) -> Ended:
    """Go a path to its end without a stop; return what it came to."""
    while True:
        try:
            next(path)
        except StopIteration as end:
            found: Ended = end.value
            return found


@dataclass(frozen=True)
class Defaults:
    """The numbers that a method takes where the settings name none.

    Attributes:
        epochs: passes over the example
        learning_rate: step size; 0 where the method finds its own
        guard_weight: weight of the guard; 0 for none
        guard_prompts: how many prompts the guard holds at most
        temperature: divides the example's logits in the loss
        noise: blurs the example's request, in units of its embeddings' root mean square
        undo: pull towards undoing what neither the example nor the guard minds
    """

    epochs: int
    learning_rate: float = 0.0
    guard_weight: float = 0.0
    guard_prompts: int = 32
    temperature: float = 1.0
    noise: float = 0.0
    undo: float = 0.0


@dataclass(frozen=True)
class Method:
    """A repair method: its function and all that others must know of it.

    Attributes:
        name: as the settings have it
        summary: what it does, in one line for people
        solve: (bench, batch, attempt) -> a path. It stops after every epoch, yields the update as it is by then, and
            returns (update, figures for the report). The update is what to add to the checkpoint (of an adapter: to its
            base), the user's own adapter included; what is yielded holds until the path goes on. Nothing is attached
            to the model while a path has stopped, so that several may be under way. Collective
        defaults: its numbers
        four_bit: its numbers on 4-bit weights; none: it cannot work on those
        cost: what it holds and computes. One that trains anything runs in the training loop, on a model loaded for it
        prepare: what is found once for all candidates, by module name; it becomes ``bench.prepared``, and its modules
            are the layers that the method may change; none: it may change every layer to be patched. Collective
        reason: why ``auto`` takes it where it can; "": only on request
        needs_update: it needs the fine-tune's own update, from a reference or an adapter
        watched: unlabelled prompts are looked at after every epoch
        tried_by: the method that tries candidates out in its place; none: itself
        keeps_adapter: of an adapter, its update is that adapter repaired, at the same rank, to be written as such
        changes_all: it also changes what no patch holds (embeddings, norms), so that a merged checkpoint is written
            from the model itself
    """

    name: str
    summary: str
    solve: Solve
    defaults: Defaults
    four_bit: Defaults | None
    cost: Cost
    prepare: Prepare | None = None
    reason: str = ""
    needs_update: bool = False
    watched: bool = False
    tried_by: str | None = None
    keeps_adapter: bool = False
    changes_all: bool = False
