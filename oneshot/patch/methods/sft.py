"""Method sft, as in arXiv 2601.01887: AdamW on all weights; the patch is the leading part of what it changed."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.files import find_weight, list_tensors, read_tensor
from oneshot.checkpoint.update import Update
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
    stored = list_tensors(request.source.checkpoint)
    names = {id(module.weight): name for name, module in targets.items()}
    parameters = dict(engine.model.named_parameters())
    by_module = {names[id(p)]: (key, p) for key, p in parameters.items() if id(p) in names}

    def change(key: str, parameter: Any) -> torch.Tensor | None:
        whole = engine.full_weight(parameter)
        found = key if key in stored else find_weight(stored, key.removesuffix(".weight"))
        if found is None or stored[found].shape != tuple(whole.shape):
            return None  # transformers fused it while loading (experts): no stored tensor to compare with
        return whole - read_tensor(stored[found], found).to(whole.device, whole.dtype)

    def delta_of(module: str, mine: bool) -> torch.Tensor | None:
        key, parameter = by_module[module]
        if mine:
            return change(key, parameter)
        engine.full_weight(parameter)  # a collective: every rank takes part
        return None

    own = max(f.rank for f in request.adapter.update.values()) if request.adapter else 0
    directions = shared_directions(request.runtime, targets, request.recipe.rank + own, delta_of)
    total = sum(d.energy for d in directions.values())
    unmeasured = 0
    for key, parameter in parameters.items():
        if id(parameter) not in names:
            moved = change(key, parameter)
            unmeasured += moved is None
            total += 0.0 if moved is None else float(moved.square().sum())
    held = sum(float(d.s.square().sum()) for d in directions.values())
    update = {name: update_factors(d, d.s.new_ones(len(d.s))) for name, d in directions.items()}
    error = math.sqrt(max(0.0, 1 - held / total)) if total else 0.0
    return update, {"truncation_error": error, **({"tensors_not_compared": unmeasured} if unmeasured else {})}


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
