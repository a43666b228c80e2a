"""Method project: the closed form of arXiv 2601.01887, one step along the leading directions of the safety gradient.

W <- W - step * sum_{i<k} sigma_i u_i v_i^T per weight matrix, the step being the paper's alpha * eta. The gradient is
that of the one example at the unpatched model, taken from factors and never formed; the result is a rank-k update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.update import Update
from oneshot.data.encoding import Encoded
from oneshot.distributed.many import share_each
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.steps import steps
from oneshot.patch.attach import FIRST_DECREASE, Gradients, attached
from oneshot.patch.cost import Cost
from oneshot.patch.directions import Directions, leading, packed, rank_for, unpacked, update_factors
from oneshot.patch.guard import RepairBatch, alike, repair_loss
from oneshot.patch.linears import grouped, shape_of
from oneshot.patch.method import Defaults, Method
from oneshot.patch.path import Attempt
from oneshot.patch.select import hardest
from oneshot.patch.spectrum import check_rank, decomposed
from oneshot.patch.summed import gradient_factors

if TYPE_CHECKING:
    from oneshot.patch.bench import Bench
    from oneshot.patch.linears import Layer
    from oneshot.patch.recipe import Recipe

LENGTHEN, OVERSHOOTS = 2.0, 2  # steps grow by this until so many longer ones than the best were worse
CLOSE = 1.1  # the search ends where its neighbours are within this factor


def example_directions(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    example: Encoded,
    rank: int | None = None,
    rank_experts: int | None = None,
) -> dict[str, Directions]:
    """Return the top ``rank`` (none: all) singular directions of the example's gradient, alike on every rank.

    Each rank decomposes every world_size-th layer. Layers that the loss does not reach are left out. Collective.

    Args:
        rank_experts: of experts' matrices; none: as many as of others
    """
    import torch

    kind = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    gradients = Gradients(layers)
    with gradients.capturing(model):
        pairs = gradient_factors(runtime, model, gradients, [example], pad=0)  # one row has no padding
    found: dict[str, Directions] = {}
    tokens = len(example.input_ids)
    for first, group in grouped(layers):
        shapes = [shape_of(layers[name]) for name in group]
        most = tokens if rank is None else min(rank_for(layers[group[0]], rank, rank_experts), tokens)
        ranks = [min(most, *shape) for shape in shapes]
        sizes = [k * (m + n + 1) + 1 for k, (m, n) in zip(ranks, shapes)]
        own = dict[int, torch.Tensor]()
        for i in range((runtime.rank - first) % runtime.world_size, len(group), runtime.world_size):
            pair = pairs.pop(group[i], None)
            none = torch.zeros(sizes[i], device=runtime.device, dtype=kind)
            own[i] = none if pair is None else packed(leading(decomposed(pair), ranks[i]))
        for name, shape, k, flat in zip(group, shapes, ranks, share_each(runtime, own, sizes, first, kind)):
            if flat[-1] > 0:
                found[name] = unpacked(flat, shape, k)
    return found


def projected(directions: dict[str, Directions], step: float, rank: int) -> Update:
    """Return the update -step * sum_{i<rank} sigma_i u_i v_i^T of every matrix."""
    cut = {name: Directions(d.u[:, :rank], d.s[:rank], d.vt[:rank], d.energy) for name, d in directions.items()}
    return {name: update_factors(d, -step * d.s.new_ones(len(d.s))) for name, d in cut.items()}


def energy_within(directions: dict[str, Directions], rank: int) -> float:
    """Return sum of sigma^2 over the first ``rank`` directions of all matrices: the loss's slope along the step."""
    return sum(float(d.s[:rank].double().square().sum()) for d in directions.values())


def losses(runtime: Runtime, model: Any, batch: RepairBatch, temperature: float = 1.0) -> tuple[float, float]:
    """Return (example loss, guard KL) of the model as it is now, in nats per token, alike on every rank. Collective."""
    import torch

    with torch.no_grad():
        _, example, held = repair_loss(model, batch, 1.0, runtime.world_size, temperature)
    return alike(runtime, example, held)


def next_step(seen: dict[float, float], first: float) -> float | None:
    """Return the step to try next, given those tried (0 among them) and their losses; none where the search is done.

    Steps are lengthened from ``first`` until two longer ones than the best were worse (or shortened until one is
    better than none); then the wider side of the best is halved, on a logarithmic scale.
    """
    best = min(seen, key=lambda step: (seen[step], step))
    tried = sorted(step for step in seen if step > 0)
    longer = [step for step in tried if step > best]
    if not tried:
        return first
    if best == 0:
        return tried[0] / LENGTHEN**2
    if len(longer) < OVERSHOOTS:
        return tried[-1] * LENGTHEN
    below = max((step for step in tried if step < best), default=best / LENGTHEN**2)
    if longer[0] / below < CLOSE:
        return None
    return math.sqrt(best * longer[0]) if longer[0] / best > best / below else math.sqrt(best * below)


def search(
    judge: Callable[[float], tuple[float, float]], first: float, start: float, attempt: Attempt, tries: int
) -> Iterator[float]:
    """Yield, after each of at most ``tries``, the step that leaves the lowest example loss + guard_weight * guard KL.

    It is 0 while none has lowered it.

    Args:
        judge: step -> (example loss, guard KL)
        first: the step to begin with
        start: the loss without any step
    """
    seen = {0.0: start}
    for epoch in range(1, tries + 1):
        step = next_step(seen, first)
        if step is None:
            break
        example, kl = judge(step)
        total = example + attempt.guard_weight * kl
        better = total < min(seen.values())  # no number is never less than one, and the first is one
        seen[step] = total
        attempt.tracer.add(epoch=epoch, loss=example, guard_kl=kl, step_size=step, accepted=better)
        yield min(seen, key=lambda step: (seen[step], step))


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Take the projected step; see ``Method.solve``."""
    request = bench.request
    path = step_along(request.runtime, bench.model, bench.linears.targets, batch, attempt, request.recipe)
    return (yield from bench.on_own(path))


def step_along(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    batch: RepairBatch,
    attempt: Attempt,
    recipe: Recipe,
) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """A path to the projected step, and figures for the report. Collective.

    The first step tried aims, to first order, at a tenth of the loss: sum sigma^2 is the slope, so that no scale of
    gradients need be known. Each try is a forward pass.

    Args:
        recipe: its epochs are the steps tried at most; its learning rate, where there is one, is the step to take
            without a search; its rank is the most that is taken, of a short example all that there are
    """
    example, rank, step = batch.example, recipe.rank, recipe.learning_rate or None
    directions = example_directions(runtime, model, layers, example, rank, recipe.rank_experts)
    energy, whole = energy_within(directions, rank), sum(d.energy for d in directions.values())

    def judge(tried: float) -> tuple[float, float]:
        with attached(layers, projected(directions, tried, rank)):
            return losses(runtime, model, batch, recipe.temperature)

    start = losses(runtime, model, batch, recipe.temperature)[0]
    attempt.tracer.check(0, start)
    if step is not None:
        loss, kl = judge(step)
        attempt.tracer.check(1, loss + attempt.guard_weight * kl)
        attempt.tracer.add(epoch=1, loss=loss, guard_kl=kl, step_size=step, accepted=True)
    elif energy > 0:
        for step in search(judge, FIRST_DECREASE * start / energy, start, attempt, recipe.epochs):
            yield projected(directions, step, rank)
    facts = {"step_size": step or 0.0, "energy_of_directions": energy / whole if whole else math.nan}
    return projected(directions, step or 0.0, rank), facts


@dataclass(frozen=True)
class Sweep:
    """What the sweep goes through.

    Attributes:
        ranks, alphas: every pair of them is a patch
        others: safety examples that the patch has not seen, for others_loss; may be empty
    """

    ranks: list[int]
    alphas: list[float]
    others: list[Encoded]


def sweep(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    batch: RepairBatch,
    through: Sweep,
    pad: int,
) -> list[dict[str, float]]:
    """Return a row for every rank k and alpha: how few directions do what the whole gradient does. Collective.

    eta is the same throughout: the step at which the whole gradient would, to first order, bring the example's loss
    to 0 (loss / sum sigma^2). A row holds rank, alpha, step (alpha * eta), loss (of the example), others_loss and
    guard_kl, in nats per token, and energy: the share of sum sigma^2 within the rank. others_loss is a mean; nan
    without any others.

    Raises:
        UserError: one of the ranks is over that of the example's gradient in every matrix
    """
    example = batch.example
    for rank in through.ranks:
        check_rank(rank, "spectrum.ranks", example, layers)
    directions = example_directions(runtime, model, layers, example, max(through.ranks))
    whole = sum(d.energy for d in directions.values())
    update: Update = {}
    rows = []
    pairs = len(through.ranks) * len(through.alphas)
    with attached(layers, update), steps("ranks and step lengths tried", pairs, "pairs") as going:
        eta = losses(runtime, model, batch)[0] / whole if whole else 0.0
        for rank in through.ranks:
            within = energy_within(directions, rank) / whole if whole else math.nan
            for alpha in through.alphas:
                update.clear()
                update.update(projected(directions, alpha * eta, rank))
                loss, kl = losses(runtime, model, batch)
                unseen = hardest(runtime, model, through.others, pad) if through.others else [math.nan]
                rows.append(
                    {
                        "rank": rank, "alpha": alpha, "step": alpha * eta, "energy": within, "loss": loss,
                        "others_loss": sum(unseen) / len(unseen), "guard_kl": kl,
                    }
                )  # fmt: skip
                going.add()
    return rows


METHOD = Method(
    name="project",
    summary="the paper's closed form: one step along the leading directions of the example's gradient",
    solve=solve,
    cost=Cost(factors=1, guard_gradient=False, backward=False, extra_passes=1),
    defaults=Defaults(epochs=20, guard_weight=1.0),
    four_bit=Defaults(epochs=20, guard_weight=1.0),
)
