"""Gradient steps on full weight matrices that never form a gradient matrix, nor touch a weight.

For y = W x on T tokens dL/dW = delta^T X, so the step W - eta delta^T X is the update b = [b, -eta delta^T],
a = [a; X]. Captured again with the update in place, the pair is the exact gradient of the effective weight. After
each step the factors are re-compressed to rank k by QR and a small SVD (exact while the rank fits).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.update import Factors, Update, compress, fading
from oneshot.distributed.many import gather_each, share_each
from oneshot.distributed.runtime import Runtime, all_reduce_sum
from oneshot.patch.attach import FIRST_DECREASE, Gradients, attached
from oneshot.patch.cost import Cost
from oneshot.patch.directions import rank_for
from oneshot.patch.guard import RepairBatch, repair_loss
from oneshot.patch.linears import grouped, shape_of
from oneshot.patch.method import Defaults, Method
from oneshot.patch.path import Attempt

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench
    from oneshot.patch.linears import Layer
    from oneshot.patch.recipe import Recipe

Pairs = dict[str, tuple[Any, Any]]  # name -> (X, delta)

LENGTHEN, SHORTEN = 1.5, 0.5


def stepped(factors: Factors | None, x: torch.Tensor, delta: torch.Tensor, eta: float, rank: int | None) -> Factors:
    """Return the update after one gradient step of size ``eta``.

    Args:
        x: (rows, n) inputs of the layer
        delta: (rows, m) gradients of the loss at its output
    """
    import torch

    b, a = -eta * delta.T, x
    if factors is not None:
        b, a = torch.cat([factors.b, b], dim=1), torch.cat([factors.a, a], dim=0)
    return compress(Factors(b, a), rank, steady=True)


def step_update(
    runtime: Runtime, layers: Mapping[str, Layer], update: Update, pairs: Pairs, eta: float, recipe: Recipe
) -> Update:
    """Return the update after a step; each rank computes its share of the layers, and all get all of them.

    An expert to which no token was sent keeps what it has; where that is nothing, it is left out.

    Args:
        recipe: its ranks are the update's
    """
    import torch

    shared: Update = {}
    for first, group in grouped(layers):
        own, sizes, shapes = dict[int, Factors](), list[int](), list[tuple[int, int, int]]()
        for i, name in enumerate(group):
            (m, n), rows, old = shape_of(layers[name]), len(pairs[name][0]), update.get(name)
            rank = rank_for(layers[name], recipe.rank, recipe.rank_experts)
            k = min((old.rank if old else 0) + rows, m, n, rank or m)  # as compress() cuts it
            shapes.append((m, n, k))
            sizes.append(k * (m + n))
            if (first + i) % runtime.world_size == runtime.rank and k:
                own[i] = stepped(old, *pairs[name], eta, rank)
        if runtime.world_size == 1:
            shared |= {group[i]: factors for i, factors in own.items()}
            continue
        flat = {i: torch.cat([f.b.flatten(), f.a.flatten()]) for i, f in own.items()}
        for name, (m, n, k), found in zip(group, shapes, share_each(runtime, flat, sizes, first)):
            if k:
                b, a = found.split([m * k, k * n])
                shared[name] = Factors(b.view(m, k), a.view(k, n))
    return shared


def gradient(
    runtime: Runtime,
    model: Any,
    gradients: Gradients,
    batch: RepairBatch,
    guard_weight: float,
    temperature: float = 1.0,
) -> tuple[float, float, Pairs]:
    """Return (example loss, guard KL, factored gradient of loss + weight * KL over all ranks), in nats per token.

    The example's rows are the same on every rank and are taken once; the guard's rows are those of all ranks. Rank r
    holds the pairs of every world_size-th layer from the r-th on, those that it will step; of the others' only the
    number of rows.
    """
    import torch

    world, found = runtime.world_size, dict[str, list[tuple[Any, Any]]]()
    example, held = torch.zeros((), device=runtime.device), torch.zeros((), device=runtime.device)
    for part in batch.parts:
        gradients.clear()
        share, *losses = repair_loss(model, part, guard_weight, world, temperature)
        share.backward()
        del share
        example, held = example + losses[0], held + losses[1]
        for name, pair in _rows_of(runtime, model, gradients, part).items():
            found.setdefault(name, []).append(pair)
    gradients.clear()  # all that is wanted of it is in the pairs
    pairs = {}
    for name in list(found):
        x, delta = zip(*found.pop(name))
        pairs[name] = (torch.cat(x), torch.cat(delta)) if len(x) > 1 else (x[0], delta[0])
    return float(example), float(all_reduce_sum(runtime, held)), pairs


def _rows_of(runtime: Runtime, model: Any, gradients: Gradients, part: RepairBatch) -> Pairs:
    """The factored gradient of one pass: the example's rows, and the guard's of all ranks; see ``gradient``."""
    import torch

    world, pairs = runtime.world_size, Pairs()
    head = model.get_output_embeddings()
    for first, group in grouped(gradients.layers):
        gradients.keep, rest = part.taken(head=gradients.layers[group[0]] is head)
        x, delta = (list(side) for side in zip(*map(gradients.pair, group)))
        delta = [each * world for each in delta]  # each rank took 1 / world of the example's term
        if part.reference is not None:
            gradients.keep = rest
            guard = [gather_each(runtime, side) for side in zip(*map(gradients.pair, group))]
            x, delta = ([torch.cat(pair) for pair in zip(*sides)] for sides in zip((x, delta), guard))
        counts = _counts(runtime, x, first)
        for i, name in enumerate(group):
            mine = (first + i) % world == runtime.rank  # of another's all that is needed here is how many rows it has
            none = x[i].new_empty(counts[i], 0)
            pairs[name] = (x[i], delta[i]) if mine else (none, none)
    return pairs


def _counts(runtime: Runtime, parts: list[torch.Tensor], first: int) -> list[int]:
    """How many rows each matrix has at the rank that steps it.

    Ranks may differ in which expert a token of the example is sent to, where two are nearly as good.
    """
    import torch

    counts = [len(part) for part in parts]
    if runtime.world_size == 1 or len(parts) == 1:
        return counts
    mine = [(first + i) % runtime.world_size == runtime.rank for i in range(len(parts))]
    agreed = torch.tensor([count * own for count, own in zip(counts, mine)], device=runtime.device)
    found: list[int] = all_reduce_sum(runtime, agreed).tolist()
    return found


def steepest(x: torch.Tensor, delta: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return factors of U V^T, where delta^T X = U S V^T (its top ``rank`` directions), and the sum of their S.

    Among all steps of one spectral norm this one lowers the loss most (to first order): it moves every direction of
    the gradient alike, where the plain gradient of one example moves little but its first few. Rows are as many as
    there were, at most ``rank``, zeros among them where there is less to move: shapes do not depend on the values. The
    cut is made here, where the singular values tell the directions apart: afterwards they are all equally long, and
    rounding would decide. No Q is formed, of which only the kept directions' share is wanted.
    """
    import torch

    reflectors_x, rx = _reflectors(x.T)
    reflectors_d, rd = _reflectors(delta.T)
    u, s, vt = torch.linalg.svd(rd @ rx.T, full_matrices=False)
    size = len(s) if rank is None else min(rank, len(s))
    steady = fading(s, size)
    u, s, vt = u[:, :size], s[:size], vt[:size]
    kept = steady * s / (s + 1e-3 * s.max()) if size and s.max() > 0 else torch.zeros_like(s)  # nothing for noise
    missing = (0, 0, 0, (len(x) if rank is None else min(rank, len(x))) - size)
    right, left = (torch.nn.functional.pad(q.T, missing) for q in (
        _rotated(reflectors_x, vt.T), _rotated(reflectors_d, u * kept)
    ))  # fmt: skip
    return right, left, float((s * kept).sum())


def _reflectors(tall: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The QR decomposition of a matrix (n, T): its Q (n, k), as Householder reflectors, and R (k, T)."""
    import torch

    packed, scales = torch.geqrf(tall)
    k = len(scales)
    return (packed[:, :k], scales), packed[:k].triu()


def _rotated(reflectors: tuple[torch.Tensor, torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Q @ columns, (n, c), of the Q that the reflectors stand for."""
    import torch

    packed, scales = reflectors
    whole = torch.nn.functional.pad(columns, (0, 0, 0, len(packed) - len(columns)))
    return torch.ormqr(packed, scales, whole)


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Fit the example with factored steps; see ``Method.solve``."""
    request = bench.request
    path = descend(request.runtime, bench.model, bench.linears.targets, batch, attempt, request.recipe)
    return (yield from bench.on_own(path))


def descend(
    runtime: Runtime,
    model: Any,
    layers: Mapping[str, Layer],
    batch: RepairBatch,
    attempt: Attempt,
    recipe: Recipe,
    *,
    fixed_step: float | None = None,
) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Fit the example, under the guard, with factored steps whose size is found on the way: a path of updates.

    Steps are steepest descent in the spectral norm (``steepest``), all layers at one radius. The first radius aims at
    a tenth of the loss, to first order, which needs no scale: gradient norms of real models are hundreds of times a
    toy's. A step that does not lower the loss is taken back and tried again at half the radius; one that does lets
    the next be longer. The forward pass that judges a step is the one that the next step needs anyway.

    Args:
        attempt: its watch looks at every step that is not taken back
        recipe: its epochs count steps taken back, too; its rank is the update's
        fixed_step: take plain gradient steps of this size instead, and all of them (full-weight SGD, factored)
    """
    update: Update = {}
    trial: Update = {}
    pairs: Pairs = {}
    best, weight = math.inf, attempt.guard_weight
    radius = fixed_step or 0.0
    gradients = Gradients(layers)
    for epoch in range(recipe.epochs + 1):
        stop = False
        with attached(layers, trial):
            with gradients.capturing(model):
                example, kl, seen = gradient(runtime, model, gradients, batch, weight, recipe.temperature)
            loss = example + weight * kl
            if epoch == 0 or fixed_step:
                attempt.tracer.check(epoch, loss)
            accepted = bool(fixed_step) or loss < best  # false for a loss that is no number, too
            if epoch:
                said, stop = attempt.look(partial(dict, trial), epoch) if accepted else ({}, False)
                attempt.tracer.add(epoch=epoch, loss=example, guard_kl=kl, step_size=radius, accepted=accepted, **said)
                radius *= 1.0 if fixed_step else LENGTHEN if accepted else SHORTEN
        if accepted:
            update, best, pairs = trial, loss, seen
        if epoch == recipe.epochs or stop:
            break
        if accepted and not fixed_step:
            pairs, nuclear = _steepest(runtime, layers, pairs, recipe)
            if nuclear == 0.0:
                break  # no gradient: the model refuses already
            radius = radius or FIRST_DECREASE * loss / nuclear
        del seen
        trial = update  # no more than this is held while a path has stopped: others may have, too
        if epoch:
            yield update
        trial = step_update(runtime, layers, update, pairs, radius, recipe)
    found: Update = attempt.best(update)
    return found, {}


def _steepest(runtime: Runtime, layers: Mapping[str, Layer], pairs: Pairs, recipe: Recipe) -> tuple[Pairs, float]:
    """``steepest`` for this rank's share of the layers, and the sum of S over all layers.

    Of the others the number of rows is all that counts. Rows beyond the rank are zeros, and are not kept.
    """
    import torch

    total = torch.zeros((), device=runtime.device)
    found = dict(pairs)
    for i, (name, (x, delta)) in enumerate(pairs.items()):
        rank = rank_for(layers[name], recipe.rank, recipe.rank_experts)
        if i % runtime.world_size == runtime.rank and len(x):
            x, delta, nuclear = steepest(x, delta, rank)
            total += nuclear
        found[name] = (x[:rank].clone(), delta[:rank].clone())
    return found, float(all_reduce_sum(runtime, total))


METHOD = Method(
    name="lowrank",
    summary="gradient steps on the full weights, kept as factors and cut to a rank; needs no reference",
    reason="no --reference and no adapter, so the fine-tune's own update is not known and cannot be rolled back",
    solve=solve,
    cost=Cost(factors=1, extra_passes=1),
    defaults=Defaults(epochs=30, guard_weight=0.3),
    four_bit=Defaults(epochs=30, guard_weight=0.3),
    watched=True,
)
