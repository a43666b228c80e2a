"""Before a repair: the example is chosen, and the unpatched model answers the guard's and the watch's prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

from oneshot.checkpoint.load import load_model
from oneshot.checkpoint.update import Update
from oneshot.data.encoding import IGNORE
from oneshot.distributed.engine import frozen
from oneshot.measure.generate import generate_answers
from oneshot.patch.attach import attached_update
from oneshot.patch.guard import RepairBatch, build_batch, pad_id, with_example
from oneshot.patch.job import Job, Messages, own_update
from oneshot.patch.linears import Linears, select_linears
from oneshot.patch.objective import Harm, aligned_logits, sample
from oneshot.patch.path import ATTEMPTS, Watch, build_probes, read_probes
from oneshot.patch.recipe import EPOCHS, Recipe
from oneshot.patch.select import Chosen, Question, choose, draw
from oneshot.patch.solvers import Solver
from oneshot.patch.trace import Tracer

WATCHED = ("rollback", "lowrank")
REFUSABLE = 16  # prompts to be refused that the watch looks at


def asks_gradients(job: Job) -> bool:
    """Whether there is a choice to make, by a rule that takes gradients and the aligned model's logits."""
    return len(job.candidates) > 1 and job.rule in ("bilevel", "alignment")


def know_aligned(job: Job, model: Any = None) -> bool:
    """Fill in ``job.aligned`` from the cache, or from ``model``, the aligned one; return whether it is known now.

    The aligned model of an adapter is its base. Collective.
    """
    checkpoint = job.source.checkpoint if job.adapter is not None else job.reference
    if checkpoint is None:
        return False
    loaded_as = f"{job.source.dtype} {job.source.four_bit} {job.model_settings.double_quant}"
    rows = sample(job.candidates, job.seed).rows
    job.aligned = aligned_logits(job.runtime, rows, checkpoint, loaded_as, pad_id(job.tokenizer), model)
    return job.aligned is not None


def prepare(job: Job, recipe: Recipe, model: Any, linears: Linears, solver: Solver) -> tuple[Chosen, RepairBatch]:
    """Choose the example and let the unpatched model answer the guard's prompts. Collective.

    Args:
        model: with nothing attached
        solver: the method, to try candidates with
    """
    own, pad, harm = own_update(job), pad_id(job.tokenizer), Harm([], [])
    if asks_gradients(job):
        if job.adapter is not None and not know_aligned(job):
            know_aligned(job, model)
        harm = dataclasses.replace(sample(job.candidates, job.seed), aligned=job.aligned)

    def batch_with(guard: list[Messages]) -> RepairBatch:
        with attached_update(model, own):
            return build_batch(
                job.runtime, model, job.tokenizer, job.candidates[0], guard, answer_tokens=recipe.guard_tokens
            )

    batch = batch_with(job.guard if recipe.guard_weight else [])
    task = batch if recipe.guard_weight or not asks_gradients(job) else batch_with(job.guard)
    modules = dict(model.named_modules())
    changed = {name: modules[name] for name in solver.directions or linears.targets}
    question = Question(job.rule, job.shortlist, job.seed, pad, own, harm, task, batch)
    chosen = choose(
        job.runtime, model, changed, job.candidates, question,
        lambda trial, index: run_method(job, recipe, model, solver, trial, index, Tracer(), attempts=1)[0],
    )  # fmt: skip
    return chosen, with_example(batch, job.candidates[chosen.index], pad)


def choose_beforehand(job: Job, recipe: Recipe) -> Chosen:
    """Choose for sft and lora, on a frozen model of its own, the short list being repaired by lowrank. Collective.

    A trained model's gradients of weights would be in the way of the factors, and training with each candidate takes
    too long: lowrank changes the same weights, from the same example, in seconds.
    """
    drawn = draw(len(job.candidates), job.rule, job.seed)
    if drawn is not None:
        return drawn
    trial = dataclasses.replace(recipe, method="lowrank", epochs=EPOCHS["lowrank"])
    loaded = load_model(job.runtime, job.source, job.model_settings)
    linears = select_linears(loaded, recipe.targets)
    with frozen(job.runtime, loaded) as model:
        return prepare(job, trial, model, linears, Solver(job, trial, model, linears))[0]


def run_method(
    job: Job,
    recipe: Recipe,
    model: Any,
    solver: Solver,
    batch: RepairBatch,
    index: int,
    tracer: Tracer,
    attempts: int = ATTEMPTS,
) -> tuple[Update, Watch[Any] | None]:
    """Repair with one candidate, under the watch where there is one; nothing is attached to ``model``. Collective.

    Args:
        batch: with the candidate in row 0
        index: of the candidate
        attempts: weights of the guard to try; one candidate among several is not worth more than one
    """
    watch = watch_for(job, recipe, model, solver, index)
    if watch is None:
        return solver.solve(batch, tracer, recipe.guard_weight), None
    return solver.along_path(batch, tracer, watch, attempts), watch


def watch_for(job: Job, recipe: Recipe, model: Any, solver: Solver, index: int) -> Watch[Any] | None:
    """Return what looks at the repair after every epoch; none where it is not wanted, or there are no prompts.

    Of the pool's requests the example's own is left out: the repair learns from it. The unpatched model's answers stay
    with ``solver``, for the next candidate. Collective.
    """
    if recipe.bounds is None or recipe.method not in WATCHED or not job.refusable or not job.held:
        return None
    example, length = job.candidates[index], recipe.guard_tokens
    refusal = [token for token, label in zip(example.input_ids, example.labels) if label != IGNORE]
    with attached_update(model, own_update(job)):
        if solver.watched is None:
            prompts = [*job.refusable[: REFUSABLE + 1], *job.held]
            said = generate_answers(model, job.tokenizer, prompts, job.runtime, max_new_tokens=length, batch_size=32)
            solver.watched = list(zip(prompts, said))
        answered = solver.watched
        refusable = [each for each in answered[: -len(job.held)] if each[0] != job.prompts[index]][:REFUSABLE]
        held = answered[-len(job.held) :]
        probes = build_probes(job.runtime, model, job.tokenizer, refusal, refusable, held, answer_tokens=length)
    return Watch(lambda: read_probes(job.runtime, model, probes), recipe.bounds)
