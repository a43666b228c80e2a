"""A repair in the training loop: AdamW on what is trainable, one step on the one example for every epoch."""

from __future__ import annotations

from oneshot.patch.bench import Bench
from oneshot.patch.guard import RepairBatch, repair_loss
from oneshot.patch.path import Attempt
from oneshot.training.loop import Schedule, StepResult, autocast_dtype, train


def train_on(bench: Bench, batch: RepairBatch, attempt: Attempt) -> None:
    """Train the bench's model on the batch for the recipe's epochs. Collective."""
    assert bench.engine is not None
    request, recipe = bench.request, bench.request.recipe
    world = request.runtime.world_size

    def record(result: StepResult) -> None:
        attempt.tracer.add(epoch=result.step, loss=result.loss, grad_norm=result.grad_norm)

    train(
        bench.engine,
        Schedule(recipe.epochs, recipe.learning_rate, decay=False),
        lambda _step: [batch],
        lambda forward, b: repair_loss(forward, b, attempt.guard_weight, world, recipe.temperature)[0],
        record,
        autocast=autocast_dtype(request.runtime, request.source.dtype),
    )
