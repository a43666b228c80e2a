"""Finished cells, asked for by what they are; a fine-tuned model and what was done to it always go together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reproduce.cells import Cell
from reproduce.models import SHIPPED
from reproduce.sections import METHODS

Kind = Mapping[str, Any]  # what distinguishes a cell, beside attack, seed and size
Result = dict[str, Any]
KEPT = ("utility", "task")
SLACK = 1e-9  # rates are counts over 100 or 200, and so are bounds


class Findings:
    """The results of seeds 0 to ``seeds`` - 1 that are there."""

    def __init__(self, found: Mapping[Cell, Result], seeds: int) -> None:
        self._found, self.seeds, self.count = found, seeds, len(found)

    def result(self, attack: str, seed: int, kind: Kind, size: str = SHIPPED) -> Result | None:
        return self._found.get(Cell(attack, seed, size=size, **kind))

    def pairs(self, attack: str, kind: Kind, size: str = SHIPPED) -> list[tuple[Result, Result]]:
        """Return (fine-tuned, repaired) of each seed of which both are there."""
        each = [
            (self.result(attack, seed, METHODS["no repair"], size), self.result(attack, seed, kind, size))
            for seed in range(self.seeds)
        ]
        return [(before, after) for before, after in each if before is not None and after is not None]

    def values(
        self, attack: str, kind: Kind, of: Callable[[Result, Result], float], size: str = SHIPPED
    ) -> list[float]:
        """Return a figure of each seed, computed from the fine-tuned model's result and the repaired one's."""
        return [of(before, after) for before, after in self.pairs(attack, kind, size)]

    def rates(self, attack: str, kind: Kind, name: str, size: str = SHIPPED) -> list[float]:
        return self.values(attack, kind, lambda _, after: after["rates"][name], size)

    def drops(self, attack: str, kind: Kind, size: str = SHIPPED) -> list[float]:
        """Return of each seed the larger of the losses of utility and task, as shares; below 0 for a gain."""
        return self.values(attack, kind, lambda before, after: drop(before, after), size)

    def cpu_minutes(self) -> float:
        return float(sum(result.get("cpu_seconds", 0.0) for result in self._found.values()) / 60)


def drop(before: Result, after: Result, names: Iterable[str] = KEPT) -> float:
    """Return the largest loss of the named rates."""
    return max(float(before["rates"][name] - after["rates"][name]) for name in names)


def middle(values: list[float]) -> float | None:
    """Return the median; none of none."""
    return statistics.median(values) if values else None


def recovered_at(trace: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the first step, counted over all attempts, after which the watch's probes all say recovered."""
    from oneshot.patch.path import Bounds

    needed = Bounds().recovered
    return next((n for n, record in enumerate(trace, 1) if record.get("recovered", -1.0) >= needed), None)


def unrecovered(trace: Sequence[Mapping[str, Any]], epochs: int) -> float:
    """Return the share of the watch's probes not recovered after so many steps, or after the last; nan if unknown."""
    seen = [record["recovered"] for record in trace[:epochs] if "recovered" in record]
    return 1.0 - seen[-1] if seen else math.nan
