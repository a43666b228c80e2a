"""The second step of a repair: the example is chosen, and the unpatched model answers the guard's prompts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from oneshot.checkpoint.adapters.experts import BareMatrix, named_layers
from oneshot.data.encoding import pad_id
from oneshot.patch.bench import Bench, opened
from oneshot.patch.examples import Prompts
from oneshot.patch.guard import RepairBatch, build_batch, with_example
from oneshot.patch.methods import METHODS
from oneshot.patch.objective import RefusalRows, sample
from oneshot.patch.request import Request, own_update
from oneshot.patch.select import Chosen, Criterion, draw, pick
from oneshot.patch.solve import begin
from oneshot.patch.teacher import Teacher, asks_gradients


@dataclass(frozen=True)
class Choice:
    """The example that was taken, and the batch that holds it with the guard's rows."""

    chosen: Chosen
    batch: RepairBatch


def choose(bench: Bench, chosen: Chosen | None = None, batch: RepairBatch | None = None) -> Choice:
    """Choose the example and let the unpatched model answer the guard's prompts. Collective.

    Args:
        chosen: the example, where it has been chosen before (``choose_beforehand``)
        batch: of an earlier choice for this model, with any example, which has the guard's answers
    """
    request, recipe = bench.request, bench.request.recipe
    settings, pad = request.settings, pad_id(request.tokenizer)

    def batch_with(guard: Prompts, index: int = 0) -> RepairBatch:
        taught = [(lesson.row, lesson.logits) for lesson in bench.teacher.guard] if bench.teacher and guard.all else []
        with bench.unpatched() as model:
            return build_batch(
                request.runtime, model, request.tokenizer, request.candidates[index],
                guard.own if bench.teacher else guard.all, answer_tokens=recipe.guard_tokens, taught=taught,
            )  # fmt: skip

    held = request.guard if recipe.guard_weight else Prompts([], [])
    if chosen is not None:
        return Choice(chosen, batch_with(held, chosen.index))
    harm = RefusalRows([], [])
    if asks_gradients(request):
        aligned = bench.teacher.harm if bench.teacher else None
        harm = dataclasses.replace(sample(request.candidates, settings.seed), aligned=aligned)
    batch = batch or batch_with(held)
    task = batch if recipe.guard_weight or not asks_gradients(request) else batch_with(request.guard)
    changed = named_layers(bench.model, bench.prepared) if bench.prepared else bench.linears.targets
    changed = {name: layer for name, layer in changed.items() if not isinstance(layer, BareMatrix)}
    criterion = Criterion(
        settings.select, settings.shortlist, recipe.epochs, settings.seed, pad, own_update(request), harm, task, batch
    )
    chosen = pick(
        request.runtime, bench.model, changed, request.candidates, criterion,
        partial(begin, bench),
    )  # fmt: skip
    return Choice(chosen, with_example(batch, request.candidates[chosen.index]))


def choose_beforehand(request: Request, teacher: Teacher | None = None) -> Chosen | None:
    """Choose for a method that has candidates tried out by another one, on a model of its own; none for the others.

    A trained model's gradients of weights would be in the way of the factors, and training with each candidate takes
    too long: the other method changes the same weights, from the same example, in seconds. Collective.
    """
    recipe = request.recipe
    drawn = draw(len(request.candidates), request.settings.select, request.settings.seed)
    if recipe.method.tried_by is None or drawn is not None:
        return None  # a draw asks no model: it is made later, of those that are left in the model's own words
    other = METHODS[recipe.method.tried_by]
    trial = dataclasses.replace(recipe, method=other, epochs=other.defaults.epochs)
    with opened(dataclasses.replace(request, recipe=trial), teacher) as bench:
        return dataclasses.replace(choose(bench).chosen, begun=None)  # of another method and model
