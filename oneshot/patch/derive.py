"""Patches made from other ones: of lower rank, summed, or the difference of two checkpoints; with the error they leave.

Errors are relative Frobenius norms, and include the rounding to the dtype that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier import expert_of
from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.adapters.update import Factors, Update, compress, concatenated, norm, scaled
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.loading.segments import described
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import each, steps
from oneshot.errors import UserError
from oneshot.patch.directions import checkpoint_difference, shared_directions, update_factors
from oneshot.patch.held import counterpart, energy_left, held_tensors
from oneshot.patch.linears import layers_in_order

if TYPE_CHECKING:
    import torch

    from oneshot.patch.linears import Layer

_LOWERED = "factors rounded"


@dataclass(frozen=True)
class Remainder:
    """What an approximation leaves of an update, and the size of the update: squared Frobenius norms.

    For extracted patches it is the difference of two fp32 sums: relative errors below about 5e-4 are rounding.
    """

    error: float
    energy: float

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


def summed(parts: list[tuple[Path, Update, float]]) -> Update:
    """Return the update that adds all of them, each with its weight: exact, ranks add up.

    Args:
        parts: folder (for messages), update, weight

    Raises:
        UserError: two of them change a module in different shapes
    """
    total: Update = {}
    for folder, update, weight in parts:
        for name in update.keys() & total.keys():
            ours, theirs = ((f.b.shape[0], f.a.shape[1]) for f in (update[name], total[name]))
            if ours != theirs:
                raise UserError(
                    f"{folder} changes {name} by {ours[0]} x {ours[1]}, {parts[0][0]} by {theirs[0]} x {theirs[1]}: "
                    "they belong to different models and have no sum."
                )
        weighted = {name: scaled(factors, weight) for name, factors in update.items()} if weight != 1.0 else update
        total = concatenated(total, weighted)
    return total


def lowered(
    update: Update, rank: int | None, dtype: torch.dtype, rank_experts: int | None = None
) -> tuple[Update, dict[str, Remainder]]:
    """Return the best update of at most ``rank`` (none: as it is), in ``dtype``, and what it leaves, by module.

    Args:
        rank_experts: of experts' matrices; none: as of the others
    """
    import torch

    found: Update = {}
    left: dict[str, Remainder] = {}
    for name, factors in each(update.items(), _LOWERED, "matrices"):
        own = rank_experts if rank_experts is not None and expert_of(name) else rank
        low = rounded(compress(factors, own), dtype)
        rest = Factors(torch.cat([low.b.float(), -factors.b], dim=1), torch.cat([low.a.float(), factors.a]))
        found[name], left[name] = low, Remainder(norm(rest) ** 2, norm(factors) ** 2)
    return found, left


def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    """Return the factors in ``dtype``."""
    return Factors(factors.b.to(dtype), factors.a.to(dtype))


def is_exact(update: Update, dtype: torch.dtype) -> bool:
    """Return whether the factors survive being stored in ``dtype``."""
    import torch

    pairs = [(t, t.to(dtype).to(t.dtype)) for factors in update.values() for t in (factors.b, factors.a)]
    return all(torch.equal(before, after) for before, after in pairs)


@dataclass(frozen=True)
class Wanted:
    """What an extracted patch may change.

    Attributes:
        layers: see ``layers_to_extract``
        rank, rank_experts: of each linear layer, of each expert's matrix
        model: whose layers they are, on any device
    """

    layers: dict[str, Layer]
    rank: int
    rank_experts: int
    model: Any


def layers_to_extract(model: Any, patchable: Collection[str]) -> dict[str, Layer]:
    """Return linear layers of a model and every fused expert's matrix by name, in the order of ``layers_in_order``.

    Args:
        patchable: names of the linear layers
    """
    able = {*patchable, *expert_matrices(model)}
    return {name: layer for name, layer in layers_in_order(model).items() if name in able}


def extracted(
    runtime: Runtime, changed: Path, base: Path, wanted: Wanted, dtype: torch.dtype
) -> tuple[Update, dict[str, Remainder], dict[str, Remainder]]:
    """Return the leading part of what ``changed`` has more than ``base``, in ``dtype``. Collective.

    One matrix per rank is in memory at a time.

    Returns:
        the update (of the layers that differ), what it leaves by module, and the same of the tensors that no patch
        changes and that differ, by tensor

    Raises:
        UserError: the checkpoints have different tensors or shapes, or do not differ
    """
    with agree(runtime, f"comparing {changed} with {base}"):
        difference = checkpoint_difference(changed, base, wanted.layers, wanted.model)
        rest = _other_differences(runtime, changed, base, wanted)
    directions = shared_directions(runtime, wanted.layers, wanted.rank, difference, wanted.rank_experts)
    update: Update = {}
    left: dict[str, Remainder] = {}
    with steps(_LOWERED, len(directions), "matrices"):
        for name, found in directions.items():
            if found.energy == 0.0:
                continue
            exact = update_factors(found, found.s.new_ones(len(found.s)))
            one, kept = lowered({name: exact}, None, dtype)
            update |= one
            beyond = max(0.0, found.energy - float(found.s.double().square().sum()))
            left[name] = Remainder(beyond + kept[name].error, found.energy)
    others = {name: part for parts in gather_objects(runtime, rest) for name, part in parts.items()}
    if not update:
        raise UserError(f"{changed} and {base} have the same linear layers: there is no patch to extract.")
    return update, left, {name: Remainder(energy, energy) for name, energy in sorted(others.items())}


def _other_differences(runtime: Runtime, changed: Path, base: Path, wanted: Wanted) -> dict[str, float]:
    """Squared norms of the differences of this rank's share of the other tensors, where there are any."""
    ours, theirs = (described(folder, list_tensors(folder), wanted.model) for folder in (changed, base))
    rest = [held for held in held_tensors(theirs, wanted.model, wanted.layers) if held.left]
    found = {}
    for held in each(rest[runtime.rank :: runtime.world_size], "other tensors compared", "tensors"):
        other = counterpart(held, ours)
        if other is not None and other.shape != held.parts.shape:
            grown = "a patch holds no rows of a vocabulary that grew, so " if len(other.shape) == 2 else ""
            raise UserError(
                f"{changed} has {held.shown} of shape {list(other.shape)}, {base} of {list(held.parts.shape)}: "
                f"{grown}give two checkpoints of one model and vocabulary."
            )
        energy = energy_left(theirs, held, ours, other)
        if energy:
            found[held.shown] = energy
    return found
