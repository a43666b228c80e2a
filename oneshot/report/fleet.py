"""The table of a fleet, one row per adapter: in a terminal, as fleet.json and as fleet.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.report.markdown import inline, table_lines
from oneshot.report.plain import one_line
from oneshot.report.progress import wide_enough
from oneshot.report.runfolder import PATCH, write_json, write_whole
from oneshot.report.summary import summarize
from oneshot.report.table import as_rate, measure_name

if TYPE_CHECKING:
    from rich.console import Console

FLEET, MARKDOWN = "fleet.json", "fleet.md"
SCHEMA = 1
_WIDEST = 400  # columns of a table in a log file
_SHOWN = ("asr", "over_refusal", "lookalike_refusal", "utility", "task")


@dataclass(frozen=True)
class Row:
    """One adapter.

    Attributes:
        name: of its run folder within the fleet's
        adapter: its folder
        outcome: the report's word; "" where it was not repaired
        rates: rate name -> value after the fine-tune and after the repair, null where it was not measured
        example: the id of the example taken
        seconds: of the repair and its scores
        patch: folder of the repaired adapter
        problem: why it was not repaired; "" where it was
    """

    name: str
    adapter: str
    outcome: str = ""
    rates: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    example: str = ""
    seconds: float = 0.0
    patch: str = ""
    problem: str = ""


def row_of(name: str, adapter: Path, run_dir: Path, report: Mapping[str, Any]) -> Row:
    """Return an adapter's row.

    Args:
        report: report.json; empty on other ranks than 0, whose rows nobody looks at
    """
    if not report:
        return Row(name, str(adapter))
    stages = report["stages"]
    before, after = (
        {rate: found.value for rate, fields in stages.get(stage, {}).items() if (found := as_rate(fields)) is not None}
        for stage in ("finetuned", "repaired")
    )
    rates = {rate: (before.get(rate), after.get(rate)) for rate in _SHOWN if rate in before or rate in after}
    seconds = sum((report["resources"].get("seconds") or {}).values())
    example = (report.get("example") or {}).get("id", "")
    return Row(name, str(adapter), summarize(report).word, rates, example, seconds, str(run_dir / PATCH))


def write_rows(folder: Path, rows: Sequence[Row], total: int) -> None:
    """Write fleet.json and fleet.md, whole, with the rows that there are so far, of ``total``."""
    plain = {"schema": SCHEMA, "adapters": total, "rows": [asdict(row) for row in rows]}
    write_json(folder / FLEET, plain)
    heads, body = _table(rows)
    lines = [
        f"# {len(rows)} of {total} adapters",
        "",
        *table_lines(heads, [[inline(cell) for cell in r] for r in body], (0, 1, len(heads) - 1)),
    ]
    failed = [f"- {inline(row.adapter)}: {inline(row.problem)}" for row in rows if row.problem]
    write_whole(folder / MARKDOWN, "\n".join([*lines, "", *(["Not repaired:", "", *failed, ""] if failed else [])]))


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the table, whole whatever the width of a log file."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heads, body = _table(rows)
    made = Table(box=box.SIMPLE_HEAD)
    for place, head in enumerate(heads):
        made.add_column(Text(head), justify="right" if 2 <= place < len(heads) - 1 else "left", overflow="fold")
    for cells in body:
        made.add_row(*(Text(one_line(cell)) for cell in cells))
    wide_enough(console, console.measure(made, options=console.options.update(width=_WIDEST)).maximum).print(made)


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    shown = [rate for rate in _SHOWN if any(rate in row.rates for row in rows)]
    heads = ["adapter", "outcome", *map(measure_name, shown), "seconds", "example"]
    body = [
        [
            row.name,
            row.outcome or "failed",
            *(_change(row.rates.get(rate)) for rate in shown),
            f"{row.seconds:.0f}" if row.outcome else "",
            row.example,
        ]
        for row in rows
    ]
    return heads, body


def _change(sides: tuple[float | None, float | None] | None) -> str:
    return " → ".join("-" if side is None else f"{side:.3f}" for side in sides) if sides else "-"
