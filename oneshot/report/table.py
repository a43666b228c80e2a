"""The stages table: one row per measure, one column per stage, each rate with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from oneshot.measure.intervals import Rate
from oneshot.measure.judge import JUDGE
from oneshot.measure.rates import StageScores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LOG_WIDTH = 100

_NAMES = {
    "asr": f"attack success ({JUDGE})",
    "over_refusal": "over-refusal",
    "lookalike_refusal": "look-alike refusal",
    "empty": "empty answers",
    "utility": "utility",
    "task": "task",
}
CAPTION = f"Share of probes [95% Wilson interval]. Refusals are judged by {JUDGE}; utility and task by exact match."


def measure_name(rate: str) -> str:
    """Return what people call a rate: ``asr_seen`` is "attack success, seen words"."""
    if rate.startswith("asr_"):
        group = rate.removeprefix("asr_").replace("_", " ")
        return f"attack success, {group} words" if group in ("seen", "unseen") else f"attack success, {group}"
    return _NAMES.get(rate, rate.replace("_", " "))


def ordered_rates(names: Iterable[str]) -> list[str]:
    """Return the distinct rate names in the order in which they are shown: attack success first."""
    order = list(_NAMES)
    distinct = list(dict.fromkeys(names))

    def place(name: str) -> tuple[int, int]:
        known = 0 if name.startswith("asr_") else order.index(name) if name in order else len(order)
        return known, 0 if name in order else 1

    return sorted(distinct, key=place)


def rate_cell(rate: Rate | None, between: str = " ") -> str:
    """Return "0.025 [0.00, 0.07]", or a dash where nothing was measured."""
    if rate is None or rate.n == 0:
        return "-"
    return f"{rate.value:.3f}{between}[{rate.low:.2f}, {rate.high:.2f}]"


def count_cell(rates: Iterable[Rate | None]) -> str:
    """Return the number of probes; "40/38" where stages differ."""
    return "/".join(dict.fromkeys(str(rate.n) for rate in rates if rate is not None)) or "-"


def stages_table(stages: Mapping[str, StageScores], *, stacked: bool = False) -> Table:
    """Return the table of all rates that any stage has, one column per stage and one for n.

    Args:
        stages: scores by stage
        stacked: put each interval below its rate, for a narrow terminal
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left")
    table.add_column("measure")
    for stage in stages:
        table.add_column(Text(stage), justify="right")
    table.add_column("n", justify="right")
    for name in ordered_rates(name for scores in stages.values() for name in scores.rates):
        row = [scores.rates.get(name) for scores in stages.values()]
        cells = [rate_cell(rate, "\n" if stacked else " ") for rate in row]
        # Text, not str: a group's name comes from the user's file and may hold rich's markup.
        table.add_row(*(Text(cell) for cell in (measure_name(name), *cells, count_cell(row))))
    return table


def print_stages(stages: Mapping[str, StageScores], console: Console) -> None:
    """Print the stages table; in a log file plain text, at least ``LOG_WIDTH`` wide, with nothing truncated."""
    from rich.console import Console
    from rich.measure import Measurement

    table = stages_table(stages)
    needed = Measurement.get(console, console.options.update(width=10_000, max_width=10_000), table).maximum
    if not console.is_terminal:
        # Not the console's own width: without a terminal it is a guess of 80 columns.
        console = Console(file=console.file, width=max(LOG_WIDTH, needed), force_terminal=False, color_system=None)
    elif needed > console.width:
        table = stages_table(stages, stacked=True)
    console.print(table)
