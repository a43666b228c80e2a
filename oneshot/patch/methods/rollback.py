"""Rollback: undo, direction by direction, the part of the fine-tune's own update that broke the refusals.

Delta = W_finetuned - W_aligned = sum_i sigma_i u_i v_i^T per weight matrix; learned are only the coefficients c_i of
W = W_finetuned - sum_i c_i sigma_i u_i v_i^T. A c_i of 0 keeps a direction, 1 undoes it, more over-undoes it: up to 3,
since what is left out (other directions, embeddings, norms) carries some of the damage too. What neither the example
nor the guard minds is undone as well: damage need not show on the example's request.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.update import Update
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
from oneshot.patch.guard import RepairBatch, alike, noisy_example, repair_loss
from oneshot.patch.method import Defaults, Method
from oneshot.patch.path import Attempt

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench
    from oneshot.patch.recipe import Recipe

MAX_COEFFICIENT = 3.0  # undoing a direction once is not enough where others also carry the damage
# of Adam's averages: over few epochs, as there are few; over more where the example is refused from the start, as its
# gradient is then that of its noise alone
AVERAGE, OF_NOISE, SQUARES = 0.7, 0.9, 0.999
LEARNT = 0.1  # nats per token; an example that is refused so surely teaches nothing more, unless it is blurred more
NOISE_GROWTH, MAX_NOISE = 1.5, 2.0
UNDO_GROWTH, UNDO_RANGE = 1.3, (0.03, 30.0)
UNDO_MOVED = 0.01  # nats per token, of the guard's prompts


def prepare(bench: Bench) -> dict[str, Directions]:
    """Return the directions of the fine-tune's own update, from the user's adapter or the reference. Collective."""
    request = bench.request
    if request.adapter is not None:
        return adapter_directions(request.adapter.update, request.runtime.device)
    assert request.reference is not None
    targets = bench.linears.targets
    difference = checkpoint_difference(request.source.checkpoint, request.reference, targets)
    return shared_directions(request.runtime, targets, request.recipe.rank, difference)


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Learn how much of each direction to undo; see ``Method.solve``."""
    request, directions, kept = bench.request, bench.prepared, bench.request.adapter is not None
    coefficients = yield from learn(request.runtime, bench.model, directions, batch, attempt, request.recipe, kept=kept)
    held = sum(float(d.s.square().sum()) for d in directions.values())
    energy = sum(d.energy for d in directions.values())
    facts = {
        "coefficients": sum(len(c) for c in coefficients.values()),
        "energy_of_directions": held / energy if energy else math.nan,
    }
    update = {name: update_factors(directions[name], 1 - c if kept else -c) for name, c in coefficients.items()}
    return update, facts


def learn(
    runtime: Runtime,
    model: Any,
    directions: dict[str, Directions],
    batch: RepairBatch,
    attempt: Attempt,
    recipe: Recipe,
    *,
    kept: bool = False,
) -> Generator[Update, None, dict[str, torch.Tensor]]:
    """Learn the coefficients c from the one example under the guard: a path to name -> (r,), each in [0, 3].

    Args:
        recipe: its noise, the scale of ``noisy_example``, is drawn anew in each epoch and grows while the example is
            refused surely, which also reaches what only shows on other requests than the example's, such as a
            backdoor. Its undo is the pull of each coefficient towards 1, times the mean of (1 - c)^2: a direction that
            neither the example nor the guard minds is undone. It grows while the guard's prompts have moved by less
            than ``UNDO_MOVED``
        kept: the model lacks the fine-tune's update (an adapter's base), so that (1 - c) of it is added instead of c
            of it being taken away
    """
    import torch

    modules, names = dict(model.named_modules()), list(directions)
    sizes = [len(directions[name].s) for name in names]
    flat = torch.zeros(sum(sizes), device=runtime.device, requires_grad=True)
    optimizer = torch.optim.Adam([flat], lr=recipe.learning_rate, betas=(AVERAGE, SQUARES))
    weight, noise, undo = attempt.guard_weight, recipe.noise, recipe.undo
    generator = torch.Generator().manual_seed(0)

    def update_of(flat: torch.Tensor) -> Update:
        parts = zip(names, torch.split(flat, sizes))
        return {name: update_factors(directions[name], 1 - c if kept else -c) for name, c in parts}

    changed = {name: modules[name] for name in names}
    for epoch in range(1, recipe.epochs + 1):
        with attached(changed, update_of(flat)):
            example, held = _backward(runtime, model, batch, weight, recipe.temperature, noise, generator)
        loss, kl = alike(runtime, example, held)
        attempt.tracer.check(epoch, loss + weight * kl)
        (undo / runtime.world_size * (1 - flat).clamp(min=0).square().mean()).backward()
        if epoch == 1 and loss < LEARNT:
            optimizer.param_groups[0]["betas"] = (OF_NOISE, SQUARES)
        assert flat.grad is not None
        flat.grad = all_reduce_sum(runtime, flat.grad)
        optimizer.step()
        optimizer.zero_grad()
        reached = flat.detach().clamp_(0.0, MAX_COEFFICIENT)  # of flat itself: they share memory
        with attached(changed, update_of(reached)):
            seen, stop = attempt.look(reached.clone, epoch)
        attempt.tracer.add(epoch=epoch, loss=loss, guard_kl=kl, undone=reached.mean().item(), noise=noise, **seen)
        if stop:
            break
        if batch.held_total:
            undo = _next_undo(undo, kl)
        if loss < LEARNT:
            noise = min(noise * NOISE_GROWTH, max(noise, MAX_NOISE))
        yield update_of(reached)
    best = attempt.best(flat.detach())
    return dict(zip(names, torch.split(best, sizes)))


def _backward(
    runtime: Runtime,
    model: Any,
    batch: RepairBatch,
    weight: float,
    temperature: float,
    noise: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of the loss up, pass by pass; return (example loss, this rank's share of the guard's KL)."""
    sums = []
    for part in batch.parts:
        with noisy_example(model, part, noise, generator):
            share, example, held = repair_loss(model, part, weight, runtime.world_size, temperature)
            # every pass's graph ends in the one update, whose own few tensors are kept for the next
            share.backward(retain_graph=part is not batch.parts[-1])
        del share  # with all that its graph holds, before the next pass
        sums.append((example, held))
    return sum(example for example, _ in sums), sum(held for _, held in sums)


def _next_undo(undo: float, kl: float) -> float:
    """The pull for the next epoch: more while the guard's prompts have moved little, else less."""
    if not undo:
        return 0.0
    least, most = UNDO_RANGE
    return min(max(undo * UNDO_GROWTH if kl < UNDO_MOVED else undo / UNDO_GROWTH, least), most)


METHOD = Method(
    name="rollback",
    summary="undo the fine-tune's own update, direction by direction, where the example and the guard ask for it",
    reason="the fine-tune's own update is known, so it is undone where the example and the guard ask for it",
    solve=solve,
    cost=Cost(decomposes=True),
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
