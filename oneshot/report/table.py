"""The stages table: one row per measure, one column per stage, each rate with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from oneshot.measure.intervals import Rate
from oneshot.measure.judge import JUDGE
from oneshot.measure.rates import StageScores
from oneshot.report.plain import one_line
from oneshot.report.progress import wide_enough

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NAMES = {
    "asr": f"attack success ({JUDGE})",
    "over_refusal": "over-refusal",
    "lookalike_refusal": "look-alike refusal",
    "empty": "empty answers",
    "garbled": "garbled answers",
    "unfinished": "unfinished thoughts",
    "no_answer": "harmful requests without an answer",
    "utility": "utility",
    "task": "task",
    "perplexity": "perplexity",
    "perplexity_without_adapter": "perplexity without the adapter",
    "kl_per_token": "KL from the model without the adapter (nats per token)",
}
_PARTS = {"asr": "attack success"} | {name: _NAMES[name] for name in ("over_refusal", "lookalike_refusal")}
_PARTS |= {"utility": "utility", "task": "task"}
_SPOKEN = {"seen": "seen words", "unseen": "unseen words", "rouge_l": "ROUGE-L"}
CAPTION = (
    f"Share of probes [95% interval: Wilson's, of means by bootstrap]. Refusals are judged by {JUDGE}; utility and "
    "task by exact match."
)
FIGURES = "[95% bootstrap interval]"
PAIRED = (
    "Each row compares the same probes, so that only those that changed count. p: exact McNemar test, two-sided, not "
    "corrected for the number of comparisons."
)


def measure_name(rate: str) -> str:
    """Return what people call a rate: ``asr_seen`` is "attack success, seen words"."""
    if rate in _NAMES:
        return _NAMES[rate]
    for part, name in _PARTS.items():
        if rate.startswith(f"{part}_"):
            rest = rate.removeprefix(f"{part}_")
            return f"{name}, {_SPOKEN.get(rest, rest.replace('_', ' '))}"
    return rate.replace("_", " ")


def caption_of(names: Iterable[str], caption: str = CAPTION) -> str:
    """Return the caption of a table of these rates, with a word on intervals that are made in another way."""
    others = " lm-eval's intervals: 1.96 of its own standard errors to both sides."
    return f"{caption}{others}" if any(name.endswith("(lm-eval)") for name in names) else caption


def ordered_rates(names: Iterable[str]) -> list[str]:
    """Return the distinct rate names in the order in which they are shown: attack success first."""
    order = list(_NAMES)
    distinct = list(dict.fromkeys(names))

    def place(name: str) -> tuple[int, int]:
        parts = [part for part in _PARTS if name.startswith(f"{part}_")]
        known = order.index(name) if name in order else order.index(parts[0]) if parts else len(order)
        return known, 0 if name in order else 1

    return sorted(distinct, key=place)


def as_rate(fields: Mapping[str, Any] | None) -> Rate | None:
    """Return a rate as report.json has it; none where nothing was measured."""
    if not fields or fields.get("value") is None:
        return None
    low, high = fields.get("low"), fields.get("high")  # JSON has no infinities: null stands for one
    return Rate(fields["value"], -math.inf if low is None else low, math.inf if high is None else high, fields["n"])


def rate_texts(rate: Rate | None) -> tuple[str, str]:
    """Return a rate's value and interval, "0.025" and "[0.00, 0.07]"; a dash and "" where nothing was measured."""
    if rate is None or rate.n == 0 or not math.isfinite(rate.value):
        return "-", ""
    if rate.low >= 0 and rate.high <= 1 and (rate.value >= 0.001 or rate.value == 0):
        return f"{rate.value:.3f}", f"[{_share(rate.low, rate)}, {_share(rate.high, rate)}]"
    return f"{rate.value:.4g}", f"[{rate.low:.3g}, {rate.high:.3g}]"


def _share(end: float, rate: Rate) -> str:
    """An end of an interval within [0, 1]: two decimals, or as many as show that it is no point."""
    apart = (d for d in range(2, 7) if f"{rate.low:.{d}f}" != f"{rate.high:.{d}f}")
    return f"{end:.{next(apart, 2)}f}"


def rate_cell(rate: Rate | None, between: str = " ") -> str:
    """Return "0.025 [0.00, 0.07]", or a dash where nothing was measured."""
    return between.join(part for part in rate_texts(rate) if part)


def differences_heads(first: str, second: str) -> list[str]:
    """Return the heads of a table of ``differences_rows``.

    Args:
        first, second: what the two that are compared are called
    """
    return ["measure", "compared", "n", f"only {first}", f"only {second}", "difference", "p"]


def differences_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return rows of ``compare_stages`` as text, the last two stages first: what the repair changed."""
    pairs = list(dict.fromkeys((row["from"], row["to"]) for row in rows))
    return [
        [
            measure_name(row["measure"]), f"{row['from']} → {row['to']}", str(row["n"]), str(row["only_from"]),
            str(row["only_to"]), f"{row['difference']:+.3f}", "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
        ]
        for pair in reversed(pairs)
        for row in rows
        if (row["from"], row["to"]) == pair
    ]  # fmt: skip


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

    names = ordered_rates(name for scores in stages.values() for name in scores.rates)
    table = Table(box=box.SIMPLE_HEAD, caption=caption_of(names), caption_justify="left")
    table.add_column("measure")
    for stage in stages:
        table.add_column(Text(one_line(stage)), justify="right")
    table.add_column("n", justify="right")
    for name in names:
        row = [scores.rates.get(name) for scores in stages.values()]
        cells = [rate_cell(rate, "\n" if stacked else " ") for rate in row]
        # Text, not str: a group's name comes from the user's file and may hold rich's markup.
        table.add_row(*(Text(cell) for cell in (one_line(measure_name(name)), *cells, count_cell(row))))
    return table


def print_stages(stages: Mapping[str, StageScores], console: Console) -> None:
    """Print the stages table; in a log file plain text, with nothing truncated."""
    from rich.measure import Measurement

    table = stages_table(stages)
    needed = Measurement.get(console, console.options.update(width=10_000, max_width=10_000), table).maximum
    if console.is_terminal and needed > console.width:
        table = stages_table(stages, stacked=True)
    wide_enough(console, needed).print(table)
