"""The figures of a spectrum: medians over matrices, and the matrices of each module and of each layer."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from oneshot.patch.spectrum import Matrix, Spectrum, cosine_over

SHOWN_RANKS = (1, 2, 4, 8, 20)


def module_of(name: str) -> tuple[int | None, str]:
    """Return (layer, module) of a matrix's name, the layer being its first number: 3 and "self_attn.q_proj".

    Later numbers, of experts, become "*", so that these share a column.
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"\b\d+\b", "*", name[match.end() :])


def short_name(module: str, modules: Iterable[str]) -> str:
    """Return the last part of a module's name, or all of it where another module ends alike."""
    last = module.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in modules) <= 1 else module


def energy_at(matrix: Matrix, rank: int) -> float:
    """Return the cumulative energy ratio CER(rank): the share of sum(sigma^2) in the first ``rank`` directions."""
    squares = [value * value for value in matrix.singular_values]
    total = sum(squares)
    return sum(squares[:rank]) / total if total else math.nan


def medians(matrices: Sequence[Matrix], groups: Iterable[str]) -> dict[str, Any]:
    """Return medians over matrices, and cosines over them together."""
    reached = [matrix for matrix in matrices if matrix.rank]
    compared = [matrix for matrix in reached if matrix.compared[0]]
    return {
        "matrices": len(reached),
        "rank": _median(matrix.rank for matrix in reached),
        "effective_rank": _median(matrix.effective_rank for matrix in reached),
        "directions_90": _median(matrix.directions_90 for matrix in reached),
        "directions_99": _median(matrix.directions_99 for matrix in reached),
        "energy": {str(rank): _median(energy_at(matrix, rank) for matrix in reached) for rank in SHOWN_RANKS},
        **{
            name: _median(getattr(matrix, name) for matrix in compared)
            for name in ("overlap_left", "overlap_right", "chance_left", "chance_right")
        },
        "cosines": {group: cosine_over(list(matrices), group) for group in groups},
    }


def by_module(spectrum: Spectrum) -> dict[str, list[Matrix]]:
    """Return the matrices of each module, all layers together, in the model's order."""
    found: dict[str, list[Matrix]] = {}
    for matrix in spectrum.matrices:
        found.setdefault(module_of(matrix.name)[1], []).append(matrix)
    return found


def by_layer(spectrum: Spectrum) -> dict[int, list[Matrix]]:
    """Return the matrices of each layer; those that belong to none are left out."""
    found: dict[int, list[Matrix]] = {}
    for matrix in spectrum.matrices:
        layer = module_of(matrix.name)[0]
        if layer is not None:
            found.setdefault(layer, []).append(matrix)
    return found


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else math.nan
