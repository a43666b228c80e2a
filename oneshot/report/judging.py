"""What console, page, report.md and cards say of what the judges read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneshot.measure.conditions import hex_phi_lines, judged_after, other_lengths

if TYPE_CHECKING:
    from rich.console import Console


def judging_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what was judged after how many tokens, and what each figure of HEx-PHI is; none where it is not known."""
    found = report.get("conditions")
    if not found:  # a report of an earlier version
        return []
    return [judged_after(found), *other_lengths(found), *hex_phi_lines(report.get("sets") or {})]


def print_judging(report: Mapping[str, Any], console: Console) -> None:
    """Print ``judging_lines``."""
    for line in judging_lines(report):
        console.print(line, highlight=False, markup=False)
