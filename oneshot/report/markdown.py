"""report.md: what report.html says, for places that show Markdown, without the answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.report import facts
from oneshot.report.judging import judging_lines
from oneshot.report.opening import deploy_lines, numbers, run_rows
from oneshot.report.plain import one_line, plain, shortened
from oneshot.report.runfolder import write_whole
from oneshot.report.summary import JUDGE_NOTE, LIMITS, summarize
from oneshot.report.table import (
    CAPTION,
    FIGURES,
    PAIRED,
    as_rate,
    caption_of,
    count_cell,
    differences_heads,
    differences_rows,
    measure_name,
    ordered_rates,
    rate_cell,
)
from oneshot.report.times import SHOWN, time_rows, times_caption

MARKDOWN = "report.md"
_CANDIDATES = 10  # shown at most
_TEXT_CHARACTERS = 2_000
# What Markdown or HTML takes for markup within a line, and the beginnings of what GitHub makes links of.
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def write_markdown(run_dir: Path, report: Mapping[str, Any]) -> Path:
    """Write report.md and return its path.

    Args:
        report: as ``build_report`` makes it
    """
    summary = summarize(report)
    judged = "repaired" in report["stages"]  # of a score there is no verdict, and nothing to deploy
    lines = [f"# Safety report: {inline(report['model'])}", ""]
    lines += [f"**{inline(summary.verdict.headline)}**", ""] if judged else []
    lines += [*_numbers(report["stages"]), inline(summary.lead), ""]
    lines += [inline(f"{LIMITS} {JUDGE_NOTE}"), ""]
    lines += _section("This run" + ", and how to deploy it" * judged, _run(report, run_dir, summary.word))
    lines += _listed("Warnings", report.get("warnings") or [])
    judging = [text for line in judging_lines(report) for text in ("", inline(line))]
    lines += _section("Measures by stage", stages_lines(report["stages"]) + judging)
    lines += _section("Further figures", stages_lines(report.get("figures") or {}, FIGURES))
    lines += _section(
        "What changed between stages", differences_lines(report.get("differences") or [], "first", "second")
    )
    lines += _section("The one example", _example(report.get("example")))
    lines += _section("The repair", pairs_lines(facts.repair_rows(report.get("repair"))))
    lines += _section("Resources", _resources(report.get("resources") or {}))
    lines += _section("Versions", pairs_lines(facts.version_rows(report)))
    return write_whole(run_dir / MARKDOWN, "\n".join(lines))


def _numbers(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    found = [f"- {inline(n.name)}: **{inline(n.shown)}** (n = {n.after.n})" for n in numbers(stages)]
    return [*found, ""] if found else []


def _run(report: Mapping[str, Any], run_dir: Path, word: str) -> list[str]:
    commands = deploy_lines(report, run_dir, word)
    return [*pairs_lines(run_rows(report)), *(["", *fenced("\n".join(commands))] if commands else [])]


def inline(value: Any) -> str:
    """Return text from models and users as one line of Markdown that shows it as it is."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], one_line(value))


def fenced(value: Any) -> list[str]:
    """Return text as a code block that it cannot end."""
    text = shortened(plain(value), _TEXT_CHARACTERS)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int] = (0,)) -> list[str]:
    """Return a table; cells are Markdown.

    Args:
        texts: places of the columns that hold text; those of numbers are aligned right
    """
    align = ["---" if place in texts else "---:" for place in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, align, *rows)]


def stages_lines(stages: Mapping[str, Mapping[str, Mapping[str, Any]]], caption: str = CAPTION) -> list[str]:
    """Return the stages table with what it rests on below; nothing where nothing was measured.

    Args:
        stages: as in report.json
    """
    names = ordered_rates(name for rates in stages.values() for name in rates)
    if not names:
        return []
    rows = []
    for name in names:
        rates = [as_rate(stage.get(name)) for stage in stages.values()]
        rows.append([inline(measure_name(name)), *(inline(rate_cell(rate)) for rate in rates), count_cell(rates)])
    return [*table_lines(["measure", *map(inline, stages), "n"], rows), "", inline(caption_of(names, caption))]


def differences_lines(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> list[str]:
    """Return rows of ``compare_stages`` as a table.

    Args:
        first, second: what the two that are compared are called in the heads
    """
    if not rows:
        return []
    cells = [list(map(inline, row)) for row in differences_rows(rows)]
    return [*table_lines(list(map(inline, differences_heads(first, second))), cells), "", inline(PAIRED)]


def pairs_lines(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Return names and values as a table of two columns."""
    if not rows:
        return []
    cells = [f"| {inline(name)} | {inline(shortened(plain(value), _TEXT_CHARACTERS))} |" for name, value in rows]
    return ["| | |", "|---|---|", *cells]


def _example(example: Mapping[str, Any] | None) -> list[str]:
    if not example:
        return []
    lines = [inline(facts.how_chosen(example)), "", "Request:", "", *fenced(example.get("prompt", ""))]
    lines += ["", "Answer that was learnt:", "", *fenced(example.get("response", ""))]
    heads, rows = facts.candidate_rows(example.get("selection") or {})
    if rows:
        cells = [[inline(name), *(facts.number(value) for value in values)] for name, values in rows[:_CANDIDATES]]
        lines += ["", f"The first {len(cells)} of {len(rows)} candidates, in the order of the choice:", ""]
        lines += [*table_lines([inline(head) for head in heads], cells), "", inline(facts.CHOICE)]
    return lines


def _resources(resources: Mapping[str, Any]) -> list[str]:
    heads, rows = time_rows(resources)
    cells = [[inline(name), *(shown for shown, _ in each)] for name, each in rows]
    others = pairs_lines(facts.resource_rows({name: one for name, one in resources.items() if name not in SHOWN}))
    return [*table_lines(heads, cells), "", inline(times_caption(resources)), "", *others] if rows else others


def _listed(heading: str, items: Sequence[str]) -> list[str]:
    return _section(heading, [f"- {inline(item)}" for item in items])


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *lines, ""] if lines else []
