"""Rollback: undo, direction by direction, the part of the fine-tune's own update that broke the refusals.

Delta = W_finetuned - W_aligned = sum_i sigma_i u_i v_i^T per weight matrix; learned are only the coefficients c_i of
W = W_finetuned - sum_i c_i sigma_i u_i v_i^T. A c_i of 0 keeps a direction, 1 undoes it, more over-undoes it: up to 3,
since what is left out (other directions, embeddings, norms) carries some of the damage too. Of an adapter, whose every
direction is known, a matrix of them is learnt instead, see ``oneshot.patch.undoing``. What neither the example nor the
guard minds is undone as well: damage need not show on the example's request. Experts to which no token of example,
guard and watch was sent are as the fine-tune left them: nothing is known of what undoing them does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix, named_layers
from oneshot.checkpoint.adapters.update import Update
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.patch.attach import attached
from oneshot.patch.cost import Cost
from oneshot.patch.directions import (
    Directions,
    adapter_directions,
    checkpoint_difference,
    shared_directions,
    update_factors,
)
from oneshot.patch.guard import RepairBatch, alike, repair_loss
from oneshot.patch.method import Defaults, Method
from oneshot.patch.noise import noisy_example
from oneshot.patch.path import Attempt
from oneshot.patch.steering import LEARNT, Course
from oneshot.patch.undoing import learnt_of
from oneshot.patch.weighted import Reach, Weighted, reach_of

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench
    from oneshot.patch.recipe import Recipe

# of Adam's averages: over few epochs, as there are few; over more where the example is refused from the start, as its
# gradient is then that of its noise alone
AVERAGE, OF_NOISE, SQUARES = 0.7, 0.9, 0.999


def prepare(bench: Bench) -> dict[str, Directions]:
    """Return the directions of the fine-tune's own update, from the user's adapter or the reference. Collective."""
    request = bench.request
    if request.adapter is not None:
        return adapter_directions(request.adapter.update, request.runtime.device)
    assert request.reference is not None
    targets, recipe = bench.linears.targets, request.recipe
    difference = checkpoint_difference(request.source.checkpoint, request.reference, targets, bench.model)
    return shared_directions(request.runtime, targets, recipe.rank, difference, recipe.rank_experts)


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Learn how much of each direction to undo; see ``Method.solve``."""
    request, directions, kept = bench.request, bench.prepared, bench.request.adapter is not None
    path = learn(request.runtime, bench.model, directions, batch, attempt, request.recipe, kept=kept)
    weights, unreached = yield from path
    held = sum(float(d.s.square().sum()) for d in directions.values())
    energy = sum(d.energy for d in directions.values())
    facts: dict[str, Any] = {
        "coefficients": sum(len(own) for own in weights.values()),
        "energy_of_directions": held / energy if energy else math.nan,
    }
    layers = named_layers(bench.model, directions)
    if experts := sum(isinstance(layer, ExpertMatrix) for layer in layers.values()):
        facts |= {"experts": experts, "experts_not_reached": len(unreached)}
    touched = {name: own for name, own in weights.items() if kept or name not in unreached}
    return {name: update_factors(directions[name], own) for name, own in touched.items()}, facts


def learn(
    runtime: Runtime,
    model: Any,
    directions: dict[str, Directions],
    batch: RepairBatch,
    attempt: Attempt,
    recipe: Recipe,
    *,
    kept: bool = False,
) -> Generator[Update, None, tuple[dict[str, torch.Tensor], Collection[str]]]:
    """Learn from the one example under the guard what is added of each direction: a path to name -> ``update_factors``'
    weights, -c (r,), of an adapter K (r^2,).

    With them come the names of experts' matrices that no token was sent to, of which nothing is undone.

    Args:
        recipe: its noise, the scale of ``noisy_example``, drawn anew in each epoch, also reaches what only shows on
            other requests than the example's, such as a backdoor. Its undo is the pull of all towards undone, times the
            mean square of what is left where a token was sent; with it, but of a mixture, it begins on the way to
            undone (``begun``). How all of them, and the step, go on from epoch to epoch: ``Course.after``
        kept: the model lacks the fine-tune's update (an adapter's base), so that what is left of it is added instead
            of what is undone being taken away; matrices that are no targets of the recipe stay as they are
    """
    import torch

    changed = named_layers(model, directions)
    still = {name for name in changed if kept and not re.search(recipe.targets or "", name)}
    learnt = learnt_of(changed, directions, runtime.device, kept=kept, still=still)
    flat = torch.zeros(sum(learnt.layout.sizes), device=runtime.device)
    reach = reach_of(changed, learnt.layout, flat, still)
    # a mixture, whose experts are reached one by one, ends less safe from there
    flat = (learnt.begun(flat) if recipe.undo and not reach.missed else flat).requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=recipe.learning_rate, betas=(AVERAGE, SQUARES))
    course = Course(attempt.guard_weight, recipe.noise, recipe.undo, recipe.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, recipe.epochs + 1):
        with attached(changed, update := Weighted(directions, learnt.layout, learnt.added(flat))):
            loss, kl = _backward(runtime, model, batch.turn(epoch), course, recipe.temperature, generator)
        attempt.tracer.check(epoch, loss + course.weight * kl)
        reach.add(runtime, update.asked)
        (course.undo / runtime.world_size * learnt.pull(flat, reach.pulled)).backward()
        if epoch == 1 and loss < LEARNT:
            optimizer.param_groups[0]["betas"] = (OF_NOISE, SQUARES)
        assert flat.grad is not None
        flat.grad = all_reduce_sum(runtime, flat.grad)
        optimizer.step()
        optimizer.zero_grad()
        weights = learnt.added(learnt.keep_within(flat))
        with attached(changed, update := Weighted(directions, learnt.layout, weights)):
            seen, stop = attempt.look(partial(_state, weights, reach), epoch)
        reach.add(runtime, update.asked)
        undone = learnt.undone(flat.detach(), reach.pulled)
        attempt.tracer.add(epoch=epoch, loss=loss, guard_kl=kl, undone=undone, **vars(course), **seen)
        if stop:
            break
        course = course.after(attempt, recipe, loss, kl if batch.held_total else None)
        optimizer.param_groups[0]["lr"] = course.step
        yield {name: update[name] for name in changed if kept or name not in reach.missed}
    best, missed = attempt.best(_state(learnt.added(flat.detach()), reach))
    return {name: best[learnt.layout.own(name)] for name in changed}, missed


def _state(weights: torch.Tensor, reach: Reach) -> tuple[torch.Tensor, frozenset[str]]:
    """What an epoch has come to; another attempt reaches other experts."""
    return weights.clone(), frozenset(reach.missed)


def _backward(
    runtime: Runtime,
    model: Any,
    batch: RepairBatch,
    course: Course,
    temperature: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Add this rank's gradient of the loss up, pass by pass; return (example loss, guard KL). Collective."""
    import torch

    sums = []
    for part in batch.parts:
        with noisy_example(model, part, course.noise, generator):
            share, example, held = repair_loss(model, part, course.weight, runtime.world_size, temperature)
            # every pass's graph ends in the one update, whose own few tensors are kept for the next
            share.backward(retain_graph=part is not batch.parts[-1])
        del share  # with all that its graph holds, before the next pass
        sums.append((example, held))
    return alike(runtime, *(torch.stack(losses).sum() for losses in zip(*sums)))


METHOD = Method(
    name="rollback",
    summary="undo the fine-tune's own update, direction by direction, where the example and the guard ask for it",
    reason="the fine-tune's own update is known, so it is undone where the example and the guard ask for it",
    solve=solve,
    cost=Cost(turns=True, decomposes=True),
    prepare=prepare,
    defaults=Defaults(epochs=30, learning_rate=0.3, guard_weight=1.0, guard_prompts=64, noise=0.5, undo=0.3),
    # rounding weights to 4 bits moves a model by as much as separates refusing from complying on some requests: there
    # the refusal is learnt with a margin, against which the guard needs more weight, and which takes longer
    four_bit=Defaults(
        epochs=80, learning_rate=0.2, guard_weight=2.5, guard_prompts=64, temperature=2.0, noise=0.5, undo=0.3
    ),
    needs_update=True,
    watched=True,
    keeps_adapter=True,
)
