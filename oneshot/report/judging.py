"""What console, page, report.md and cards say of the judges: what they read, and where two contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from oneshot.measure.conditions import hex_phi_lines, judged_after, other_lengths
from oneshot.measure.opposed import opposed_in

if TYPE_CHECKING:
    from rich.console import Console


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return what stands beside the word for the outcome: sentences on judges that move in opposite directions."""
    return opposed_in(report)


def judging_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what was judged after how many tokens, and what each figure of HEx-PHI is; none where it is not known."""
    found = report.get("conditions")
    if not found:  # a report of an earlier version
        return []
    return [judged_after(found), *other_lengths(found), *hex_phi_lines(report.get("sets") or {})]


def print_judging(report: Mapping[str, Any], console: Console) -> None:
    """Print ``judging_lines`` and, last, the ``headline``."""
    for line in judging_lines(report):
        console.print(line, highlight=False, markup=False)
    for line in headline(report):
        console.print(f"The judges contradict each other. {line}", highlight=False, markup=False)
