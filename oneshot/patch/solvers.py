"""Methods rollback, lowrank and project on a loaded model, its weights frozen: from a batch to an update."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from oneshot.checkpoint.update import Update, concatenated
from oneshot.data.encoding import Encoded
from oneshot.patch import lowrank, project, rollback
from oneshot.patch.attach import attached_update
from oneshot.patch.guard import RepairBatch, pad_id
from oneshot.patch.job import Job, own_update
from oneshot.patch.linears import Linears
from oneshot.patch.path import ATTEMPTS, Answered, Watch
from oneshot.patch.recipe import Recipe
from oneshot.patch.trace import Tracer


@dataclass
class Solver:
    """A method with all that it needs but the batch, so that it can be run for several.

    Nothing is attached to the model before and after; what ``solve`` returns is to be added to the loaded weights (the
    user's own adapter is in it).

    Attributes:
        directions: of rollback, found once
        facts: figures of the last run, for the report
        watched: the watch's prompts with the unpatched model's answers, once they are known
    """

    job: Job
    recipe: Recipe
    model: Any
    linears: Linears
    directions: dict[str, rollback.Directions] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    watched: list[Answered] | None = None

    def __post_init__(self) -> None:
        if self.recipe.method != "rollback":
            return
        job = self.job
        if job.adapter is not None:
            self.directions = rollback.adapter_directions(job.adapter.update, job.runtime.device)
        else:
            assert job.reference is not None
            difference = rollback.checkpoint_difference(job.source.checkpoint, job.reference, self.linears.targets)
            self.directions = rollback.shared_directions(
                job.runtime, self.linears.targets, self.recipe.rank, difference
            )

    def solve(self, batch: RepairBatch, tracer: Tracer, guard_weight: float, watch: Watch[Any] | None = None) -> Update:
        """Run the method on a batch. Collective."""
        if self.recipe.method == "rollback":
            return self._rollback(batch, tracer, guard_weight, watch)
        own = own_update(self.job)
        with attached_update(self.model, own):
            if self.recipe.method == "lowrank":
                patch = self._lowrank(batch, tracer, guard_weight, watch)
            else:
                patch = self._project(batch, tracer, guard_weight)
        return concatenated(own, patch)

    def along_path(self, batch: RepairBatch, tracer: Tracer, watch: Watch[Any], attempts: int = ATTEMPTS) -> Update:
        """Run the method under the watch, once more with another weight of the guard where no epoch was good."""
        weight: float | None = self.recipe.guard_weight
        for _ in range(attempts):
            assert weight is not None
            update = self.solve(batch, tracer, weight, watch)
            weight = watch.next_weight(weight)
            if not weight:
                break
        return update

    def _rollback(self, batch: RepairBatch, tracer: Tracer, guard_weight: float, watch: Watch[Any] | None) -> Update:
        recipe, directions, kept = self.recipe, self.directions, self.job.adapter is not None
        modules = dict(self.model.named_modules())
        coefficients = rollback.solve(
            self.job.runtime, self.model, {name: modules[name] for name in directions}, directions, batch, tracer,
            epochs=recipe.epochs, learning_rate=recipe.learning_rate, guard_weight=guard_weight,
            temperature=recipe.temperature, noise=recipe.noise, undo=recipe.undo, kept=kept, watch=watch,
        )  # fmt: skip
        held = sum(float(d.s.square().sum()) for d in directions.values())
        energy = sum(d.energy for d in directions.values())
        self.facts = {
            "coefficients": sum(len(c) for c in coefficients.values()),
            "energy_of_directions": held / energy if energy else math.nan,
        }
        return {
            name: rollback.update_factors(directions[name], 1 - c if kept else -c) for name, c in coefficients.items()
        }

    def _lowrank(self, batch: RepairBatch, tracer: Tracer, guard_weight: float, watch: Watch[Any] | None) -> Update:
        recipe = self.recipe
        return lowrank.solve(
            self.job.runtime, self.model, self.linears.targets, batch, tracer, epochs=recipe.epochs, rank=recipe.rank,
            guard_weight=guard_weight, temperature=recipe.temperature, watch=watch,
        )  # fmt: skip

    def _project(self, batch: RepairBatch, tracer: Tracer, guard_weight: float) -> Update:
        recipe = self.recipe
        row = batch.inputs["attention_mask"][0].bool()
        example = Encoded(batch.inputs["input_ids"][0][row].tolist(), batch.labels[0][row].tolist())
        patch, self.facts = project.solve(
            self.job.runtime, self.model, self.linears.targets, example, batch, pad_id(self.job.tokenizer), tracer,
            tries=recipe.epochs, rank=recipe.rank, guard_weight=guard_weight, temperature=recipe.temperature,
            step=recipe.learning_rate or None,
        )  # fmt: skip
        return patch
