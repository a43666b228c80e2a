"""Method sft, as in arXiv 2601.01887: AdamW on all weights; the patch is the leading part of what it changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix, weight_of
from oneshot.checkpoint.adapters.update import Update
from oneshot.checkpoint.loading.segments import Stored, as_it_multiplies, open_stored, read_matrix, read_parameter
from oneshot.errors import UserError
from oneshot.patch.cost import Cost
from oneshot.patch.directions import shared_directions, update_factors
from oneshot.patch.guard import RepairBatch
from oneshot.patch.method import Defaults, Method
from oneshot.patch.path import Attempt
from oneshot.patch.training import train_on

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench


def solve(bench: Bench, batch: RepairBatch, attempt: Attempt) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
    """Train all weights, in one go; see ``Method.solve``."""
    train_on(bench, batch, attempt)
    yield from ()
    return weight_change(bench)


def weight_change(bench: Bench) -> tuple[Update, dict[str, Any]]:
    """Rank-k factors of what full-weight training changed, and the relative error that they leave. Collective.

    The error counts every weight that moved, embeddings and norms too, since no patch of linear layers holds those.
    """
    assert bench.engine is not None
    engine, request, targets = bench.engine, bench.request, bench.linears.targets
    stored = open_stored(request.source.checkpoint, bench.model)
    parameters = {name: weight_of(layer) for name, layer in targets.items()}
    whole_of = functools.lru_cache(maxsize=1)(engine.full_weight)  # the experts of a parameter follow each other

    def delta_of(name: str, mine: bool) -> torch.Tensor | None:
        layer, whole = targets[name], whole_of(parameters[name])  # a collective: every rank takes part
        if not mine:
            return None
        now = as_it_multiplies(whole[layer.index], layer) if isinstance(layer, ExpertMatrix) else whole
        return now - read_matrix(stored, name, layer).to(now.device, now.dtype)

    own = max(f.rank for f in request.adapter.update.values()) if request.adapter else 0
    ranks = (request.recipe.rank + own, (request.recipe.rank_experts or request.recipe.rank) + own)
    directions = shared_directions(request.runtime, targets, ranks[0], delta_of, ranks[1])
    total = sum(d.energy for d in directions.values())
    unmeasured, taken = 0, {id(parameter) for parameter in parameters.values()}
    for key, parameter in engine.model.named_parameters():
        if id(parameter) not in taken:
            moved = _change(stored, key, engine.full_weight(parameter))
            unmeasured += moved is None
            total += 0.0 if moved is None else float(moved.square().sum())
    held = sum(float(d.s.square().sum()) for d in directions.values())
    update = {name: update_factors(d, d.s.new_ones(len(d.s))) for name, d in directions.items() if d.energy}
    error = math.sqrt(max(0.0, 1 - held / total)) if total else 0.0
    return update, {"truncation_error": error, **({"tensors_not_compared": unmeasured} if unmeasured else {})}


def _change(stored: Stored, key: str, whole: torch.Tensor) -> torch.Tensor | None:
    """What training added to a parameter; none where the files hold it in a form that is no list of ranges."""
    try:
        before = read_parameter(stored, key)
    except UserError:
        return None
    return whole - before.to(whole.device, whole.dtype) if before.shape == whole.shape else None


METHOD = Method(
    name="sft",
    summary="the paper's recipe: AdamW on all weights; the patch holds the leading part of what changed",
    solve=solve,
    cost=Cost(trains="weights", moments=2),
    defaults=Defaults(epochs=10, learning_rate=2e-5),  # the paper's
    four_bit=None,
    tried_by="lowrank",
    changes_all=True,
)
