"""The second step of a repair: the example is chosen, and the unpatched model answers the guard's prompts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from oneshot.data.conversations import Messages
from oneshot.data.encoding import pad_id
from oneshot.patch.bench import Bench, opened
from oneshot.patch.guard import RepairBatch, build_batch, with_example
from oneshot.patch.methods import METHODS
from oneshot.patch.objective import Aligned, RefusalRows, aligned_logits, sample
from oneshot.patch.request import Request, own_update
from oneshot.patch.select import Chosen, Criterion, draw, pick
from oneshot.patch.solve import begin


@dataclass(frozen=True)
class Choice:
    """The example that was taken, and the batch that holds it with the guard's rows."""

    chosen: Chosen
    batch: RepairBatch


def asks_gradients(request: Request) -> bool:
    """Whether there is a choice to make, by a rule that takes gradients and the aligned model's logits."""
    return len(request.candidates) > 1 and request.settings.select in ("bilevel", "alignment")


def know_aligned(request: Request, model: Any = None) -> Aligned | None:
    """Return the aligned model's logits on the rows that the choice is judged by, from the cache or from ``model``.

    The aligned model of an adapter is its base. Collective.

    Args:
        model: the aligned model; none looks into the cache only
    """
    checkpoint = request.source.checkpoint if request.adapter is not None else request.reference
    if checkpoint is None or not asks_gradients(request):
        return None
    loaded_as = f"{request.source.dtype} {request.source.four_bit} {request.settings.model.double_quant}"
    rows = sample(request.candidates, request.settings.seed).rows
    return aligned_logits(request.runtime, rows, checkpoint, loaded_as, pad_id(request.tokenizer), model)


def choose(bench: Bench, aligned: Aligned | None = None, chosen: Chosen | None = None) -> Choice:
    """Choose the example and let the unpatched model answer the guard's prompts. Collective.

    Args:
        aligned: the aligned model's logits, where they are known
        chosen: the example, where it has been chosen before (``choose_beforehand``)
    """
    request, recipe = bench.request, bench.request.recipe
    settings, pad = request.settings, pad_id(request.tokenizer)

    def batch_with(guard: list[Messages], index: int = 0) -> RepairBatch:
        with bench.unpatched() as model:
            return build_batch(
                request.runtime, model, request.tokenizer, request.candidates[index], guard,
                answer_tokens=recipe.guard_tokens,
            )  # fmt: skip

    held = request.guard if recipe.guard_weight else []
    if chosen is not None:
        return Choice(chosen, batch_with(held, chosen.index))
    harm = RefusalRows([], [])
    if asks_gradients(request):
        if request.adapter is not None and aligned is None:
            aligned = know_aligned(request)
            aligned = know_aligned(request, bench.model) if aligned is None else aligned
        harm = dataclasses.replace(sample(request.candidates, settings.seed), aligned=aligned)
    batch = batch_with(held)
    task = batch if recipe.guard_weight or not asks_gradients(request) else batch_with(request.guard)
    modules = dict(bench.model.named_modules())
    changed = {name: modules[name] for name in bench.prepared or bench.linears.targets}
    criterion = Criterion(
        settings.select, settings.shortlist, recipe.epochs, settings.seed, pad, own_update(request), harm, task, batch
    )
    chosen = pick(
        request.runtime, bench.model, changed, request.candidates, criterion,
        partial(begin, bench),
    )  # fmt: skip
    return Choice(chosen, with_example(batch, request.candidates[chosen.index], pad))


def choose_beforehand(request: Request, aligned: Aligned | None = None) -> Chosen | None:
    """Choose for a method that has candidates tried out by another one, on a model of its own; none for the others.

    A trained model's gradients of weights would be in the way of the factors, and training with each candidate takes
    too long: the other method changes the same weights, from the same example, in seconds. Collective.
    """
    recipe = request.recipe
    if recipe.method.tried_by is None:
        return None
    drawn = draw(len(request.candidates), request.settings.select, request.settings.seed)
    if drawn is not None:
        return drawn
    other = METHODS[recipe.method.tried_by]
    trial = dataclasses.replace(recipe, method=other, epochs=other.defaults.epochs)
    with opened(dataclasses.replace(request, recipe=trial)) as bench:
        return dataclasses.replace(choose(bench, aligned).chosen, begun=None)  # of another method and model
