"""Where a run's time went, as report.json's resources hold it: a line, or with ``--profile`` a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.report.progress import LOG_WIDTH, wide_enough
from oneshot.report.runfolder import write_json

if TYPE_CHECKING:
    from rich.console import Console

PROFILE = "profile.json"
SHOWN = ("phases", "profile")  # of the resources
_SECONDS = "Seconds are those of rank 0, without the ones of other phases within."
_COUNTS = (
    "Tokens (with padding) and bytes of weights are of all ranks together; a peak is that of the rank that held most, "
    "where it was more than ever before."
)
_LEAST = 0.01  # share of the time that a phase must have to be named in the line
Rows = list[tuple[str, list[tuple[str, float | None]]]]  # phase -> each cell as shown, and what to sort it by


def time_rows(resources: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Return the phases as a table: its heads, and of each phase its name and cells; without columns that say nothing.

    Args:
        resources: as report.json has them; those of a run before there were phases give no rows
    """
    rows = resources.get("profile") or [
        {"phase": name, "seconds": seconds} for name, seconds in (resources.get("phases") or {}).items()
    ]
    whole = sum(row["seconds"] for row in rows)
    columns: dict[str, Callable[[Mapping[str, Any]], tuple[str, float | None]]] = {
        "seconds": lambda row: (_seconds(row["seconds"]), row["seconds"]),
        "share": lambda row: (f"{row['seconds'] / whole:.0%}", row["seconds"]) if whole else ("-", None),
        "slowest rank": lambda row: _cell(row.get("slowest_seconds", 0.0), _seconds),
        "passes": lambda row: _cell(row.get("passes"), lambda count: f"{count:,}"),
        "tokens/s": lambda row: _cell(row.get("tokens_per_second"), lambda speed: f"{speed:,.0f}"),
        "GB read": lambda row: _cell(row.get("read_bytes"), _gigabytes),
        "GB written": lambda row: _cell(row.get("written_bytes"), _gigabytes),
        "peak GiB": lambda row: _cell(row.get("peak_rss_bytes"), _gib),
        "peak GPU GiB": lambda row: _cell(row.get("peak_gpu_bytes"), _gib),
    }
    if all(row.get("slowest_seconds", row["seconds"]) == row["seconds"] for row in rows):
        del columns["slowest rank"]
    cells = {head: [cell(row) for row in rows] for head, cell in columns.items()}
    heads = [head for head, shown in cells.items() if any(sort is not None for _, sort in shown)]
    return ["phase", *heads], [(row["phase"], [cells[head][i] for head in heads]) for i, row in enumerate(rows)]


def times_caption(resources: Mapping[str, Any]) -> str:
    """Return what the table's columns mean."""
    return f"{_SECONDS} {_COUNTS}" if resources.get("profile") else _SECONDS


def time_line(resources: Mapping[str, Any]) -> str:
    """Return "Time: 52 s (train 31 s, ...)", the longest first; "" where nothing was measured."""
    phases = resources.get("phases") or {}
    whole = sum(phases.values())
    if not whole:
        return ""
    longest = sorted(phases.items(), key=lambda item: -item[1])
    named = [f"{name} {_seconds(seconds)}" for name, seconds in longest if seconds >= _LEAST * whole]
    return f"Time: {_seconds(whole)} s ({', '.join(named)})"


def print_times(resources: Mapping[str, Any], console: Console) -> None:
    """Print the line; of a run with ``--profile`` the table as well."""
    if resources.get("profile"):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        heads, rows = time_rows(resources)
        console = wide_enough(console)
        padding = (0, 1 if console.width >= LOG_WIDTH else 0)  # in a narrow terminal digits count, not room
        table = Table(box=SIMPLE_HEAD, padding=padding, caption=times_caption(resources), caption_justify="left")
        for place, head in enumerate(heads):
            table.add_column(head, justify="right" if place else "left", overflow="fold")
        for name, cells in rows:
            table.add_row(name, *(shown for shown, _ in cells))
        console.print(table)
    if line := time_line(resources):
        console.print(line, highlight=False, soft_wrap=True)


def write_profile(run_dir: Path, resources: Mapping[str, Any]) -> None:
    """Write the rows of a run with ``--profile`` as profile.json; nothing of others."""
    if resources.get("profile"):
        write_json(run_dir / PROFILE, {name: resources[name] for name in SHOWN})


def _cell(value: float | None, show: Callable[[Any], str]) -> tuple[str, float | None]:
    return (show(value), value) if value else ("-", None)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f}"
