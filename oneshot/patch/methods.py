"""The repair methods: load the model, choose the example, repair, and hand back the same thing whichever it was."""

from __future__ import annotations

from oneshot.checkpoint.load import load_model
from oneshot.distributed.engine import frozen
from oneshot.patch.attach import attached_update
from oneshot.patch.job import Finish, Job, Measure, Outcome, own_update
from oneshot.patch.linears import select_linears
from oneshot.patch.prepare import prepare, run_method
from oneshot.patch.recipe import Recipe
from oneshot.patch.solvers import Solver
from oneshot.patch.trained import repair_trained

FROZEN = ("rollback", "lowrank", "project")


def repair(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """Run a repair: measure the unpatched model, patch it, measure again, write. Collective.

    Args:
        measure: called with the model and "finetuned", then with "repaired"
        finish: writes the outputs while the model is loaded
    """
    run = _repair_frozen if recipe.method in FROZEN else repair_trained
    return run(job, recipe, measure, finish)


def _repair_frozen(job: Job, recipe: Recipe, measure: Measure, finish: Finish) -> Outcome:
    """rollback, lowrank and project: the weights stay as loaded, updates are attached by hooks."""
    loaded = load_model(job.runtime, job.source, job.model_settings)
    linears = select_linears(loaded, recipe.targets)
    with frozen(job.runtime, loaded) as model:
        with attached_update(model, own_update(job)):
            measure(model, "finetuned")
        solver = Solver(job, recipe, model, linears)
        chosen, batch = prepare(job, recipe, model, linears, solver)
        update, watch = run_method(job, recipe, model, solver, batch, chosen.index, job.tracer)
        with attached_update(model, update):
            measure(model, "repaired")
        finish(model, update, linears)
    stopped_by = "epochs" if watch is None else watch.reason()
    kept = {} if watch is None else {"kept": watch.at}
    return Outcome(update, linears, chosen, stopped_by, {**solver.facts, **kept})
