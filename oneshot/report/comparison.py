"""Runs side by side, from their report.json and answers.jsonl: in a terminal, as compare.html and as compare.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.measure.intervals import Rate
from oneshot.measure.opposed import opposed
from oneshot.measure.paired import compare_stages
from oneshot.measure.rates import StageScores
from oneshot.report import facts
from oneshot.report.answers import ANSWERS
from oneshot.report.finished import FinishedRun
from oneshot.report.markdown import differences_lines, inline, table_lines
from oneshot.report.markup import Cell, document, escaped, section, table, warnings_section
from oneshot.report.page import differences_table, rate_table_cell
from oneshot.report.plain import one_line, shortened
from oneshot.report.progress import wide_enough
from oneshot.report.runfolder import write_whole
from oneshot.report.summary import JUDGE_NOTE
from oneshot.report.table import (
    as_rate,
    count_cell,
    differences_heads,
    differences_rows,
    measure_name,
    ordered_rates,
    rate_cell,
)
from oneshot.report.times import SHOWN
from oneshot.report.verdict import verdict_of

if TYPE_CHECKING:
    from rich.console import Console

PAGE, MARKDOWN = "compare.html", "compare.md"
_VALUE_CHARACTERS = 120


@dataclass(frozen=True)
class Comparison:
    """What there is to say of several runs.

    Attributes:
        stages: stage -> run -> rate name -> rate, of runs that have the stage
        outcomes: run -> its verdict, with its doubts
        facts: name -> value of each run, where they differ
        differences: as of ``compare_stages``, of the first run and each other one, last stages
        notes: what makes the figures hard to compare
    """

    runs: list[FinishedRun]
    stages: dict[str, dict[str, dict[str, Rate]]]
    outcomes: dict[str, str]
    facts: dict[str, list[str]]
    differences: list[dict[str, Any]]
    notes: list[str]


def compared(runs: Sequence[FinishedRun]) -> Comparison:
    """Return what there is to say of the runs, compared with the first one."""
    stages: dict[str, dict[str, dict[str, Rate]]] = {}
    for run in runs:
        for stage, rates in reversed(run.stages.items()):  # what the run ended with comes first
            known = {name: rate for name, fields in rates.items() if (rate := as_rate(fields)) is not None}
            stages.setdefault(stage, {})[run.name] = known
    differences, notes = [], []
    for other in runs[1:]:
        rows, said = _paired(runs[0], other)
        differences += rows
        notes += said
        notes += opposed({run.name: run.stages[run.last] for run in (runs[0], other) if run.last})
    outcomes: dict[str, str] = {run.name: verdict_of(run.report).headline for run in runs}
    return Comparison(list(runs), stages, outcomes, _differing(runs), differences, _judges(runs) + notes)


def print_comparison(found: Comparison, console: Console) -> None:
    """Print the tables, whole whatever the width of a log file."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def show(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
        made = Table(box=box.SIMPLE_HEAD, title=Text(one_line(title)), title_justify="left")
        for place, head in enumerate(heads):
            made.add_column(Text(one_line(head)), justify="right" if place else "left", overflow="fold")
        for row in rows:
            made.add_row(*(Text(one_line(cell)) for cell in row))
        console.print(made)

    console = wide_enough(console, max(120, 40 + 26 * len(found.runs)))
    names = [run.name for run in found.runs]
    show(["", *names], [["outcome", *(found.outcomes[name] for name in names)]], "Outcome")
    for stage, runs in found.stages.items():
        rows = []
        for rate in ordered_rates(name for rates in runs.values() for name in rates):
            rates = [runs.get(name, {}).get(rate) for name in names]
            rows.append([measure_name(rate), *map(_cell, rates), count_cell(rates)])
        show([stage, *names, "n"], rows, f"Stage {stage}")
    if found.differences:
        show(differences_heads("first", "second"), differences_rows(found.differences), "What differs, in pairs")
    if found.facts:
        show(["", *names], [[name, *values] for name, values in found.facts.items()], "Settings and facts that differ")
    for note in found.notes:
        console.print(f"Note: {one_line(note)}", highlight=False, markup=False)


def write_comparison(folder: Path, found: Comparison) -> list[Path]:
    """Write compare.html and compare.md, and return their paths."""
    names = [run.name for run in found.runs]
    title = f"Runs compared: {', '.join(names)}"
    page = [f"<h1>{escaped(title)}</h1>", f'<p class="soft">{escaped(JUDGE_NOTE)}</p>', warnings_section(found.notes)]
    text = [f"# {inline(title)}", "", inline(JUDGE_NOTE), "", *(f"- {inline(note)}" for note in found.notes), ""]
    outcomes = [[name, found.outcomes[name]] for name in names]
    page.append(section("Outcome", table(["run", "outcome"], [list(map(escaped, row)) for row in outcomes], "wordy")))
    text += [
        "## Outcome",
        "",
        *table_lines(["run", "outcome"], [list(map(inline, row)) for row in outcomes], (0, 1)),
        "",
    ]
    for stage, runs in found.stages.items():
        rates = ordered_rates(name for known in runs.values() for name in known)
        heads = ["run", *map(measure_name, rates)]
        cells: list[list[Cell | str]] = [
            [escaped(name), *(_counted(known.get(rate)) for rate in rates)] for name, known in runs.items()
        ]
        page.append(section(f"Stage {stage}", table(list(map(escaped, heads)), cells, "dense")))
        lines = [
            [inline(name), *(inline(_cell(known.get(rate), n=True)) for rate in rates)] for name, known in runs.items()
        ]
        text += [f"## Stage {inline(stage)}", "", *table_lines(list(map(inline, heads)), lines), ""]
    if found.differences:
        page.append(section("What differs, in pairs", differences_table(found.differences, "first", "second")))
        text += ["## What differs, in pairs", "", *differences_lines(found.differences, "first", "second"), ""]
    if found.facts:
        rows = [[name, *values] for name, values in found.facts.items()]
        shown = table(list(map(escaped, ["name", *names])), [list(map(escaped, row)) for row in rows], "wordy")
        page.append(section("Settings and facts that differ", shown))
        every = range(len(names) + 1)
        listed = table_lines(list(map(inline, ["name", *names])), [list(map(inline, row)) for row in rows], every)
        text += ["## Settings and facts that differ", "", *listed, ""]
    return [
        write_whole(folder / PAGE, document(title, page)),
        write_whole(folder / MARKDOWN, "\n".join(text)),
    ]


def _differing(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Facts and settings that are not the same in all runs."""
    tables = [_facts(run) for run in runs]
    rows = {name: [table.get(name, "-") for table in tables] for name in dict.fromkeys(n for t in tables for n in t)}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _facts(run: FinishedRun) -> dict[str, str]:
    example = run.report.get("example")
    found = {"model": run.report["model"], "ranks": run.report["world_size"]}
    if isinstance(example, dict):
        found |= {"example": example.get("id"), "selected by": example.get("selected_by")}
    repair = run.report.get("repair")
    rows = facts.repair_rows(repair) if isinstance(repair, dict) else []
    resources = {name: value for name, value in run.report["resources"].items() if name not in SHOWN}
    rows += facts.resource_rows(resources) + list(run.report["versions"].items())
    settings = {f"setting {name}": value for name, value in run.settings.items() if name != "out"}
    return {
        name: shortened(one_line(facts.number(value)), _VALUE_CHARACTERS)
        for name, value in {**found, **dict(rows), **settings}.items()
    }


def _judges(runs: Sequence[FinishedRun]) -> list[str]:
    notes = []
    if len({run.report.get("judge") for run in runs}) > 1:
        notes.append("Refusals were judged in different ways: the rates of these runs cannot be compared.")
    lengths = {run.name: (run.report.get("conditions") or {}).get("max_new_tokens") for run in runs}
    if len(known := {length for length in lengths.values() if length is not None}) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items() if length in known)
        notes.append(f"Answers of different lengths were judged (new tokens at most: {said}): judges change with them.")
    models: dict[str, dict[str, str]] = {}  # judge -> run -> its model
    for run in runs:
        for judge in (run.report.get("conditions") or {}).get("judges") or []:
            models.setdefault(str(judge.get("judge")), {})[run.name] = str(judge.get("model"))
    for name, by_run in models.items():
        if len(set(by_run.values())) > 1:
            said = ", ".join(f"{run}: {model}" for run, model in by_run.items())
            notes.append(
                f"The judge {name} was not the same model in all runs ({said}): what one says cannot be compared with "
                "what another says."
            )
    return notes


def _paired(first: FinishedRun, other: FinishedRun) -> tuple[list[dict[str, Any]], list[str]]:
    """Differences over the probes that both runs have, and what is to be said of the others."""
    pair = f"{first.name} and {other.name}"
    if not first.last or not other.last:
        return [], [f"{pair}: one of them measured nothing."]
    one, two = first.answers.get(first.last, []), other.answers.get(other.last, [])
    if not one or not two:
        unequal = [
            f"{measure_name(name)} on {rate['n']} and {theirs['n']}"
            for name, rate in first.report["stages"][first.last].items()
            if (theirs := other.report["stages"][other.last].get(name)) is not None and theirs["n"] != rate["n"]
        ]
        said = f"{pair} cannot be compared in pairs, as {ANSWERS} is missing in one of them."
        if unequal:
            said += f" They were scored on different probes: {'; '.join(unequal)}."
        return [], [said]
    ids = [{(row["kind"], row["id"]) for row in rows} for rows in (one, two)]
    both = ids[0] & ids[1]
    notes = []
    if ids[0] != ids[1]:
        notes.append(
            f"{pair} were scored on different probes, of which they share {len(both)} ({len(ids[0])} and "
            f"{len(ids[1])} in all): their rates are of different things, and only the shared probes are compared in "
            "pairs."
        )
    stages = {f"{run.name}: {run.last}": StageScores({}, rows) for run, rows in ((first, one), (other, two))}
    return compare_stages(stages), notes


def _cell(rate: Rate | None, *, n: bool = False) -> str:
    return f"{rate_cell(rate)} n={rate.n}" if n and rate is not None else rate_cell(rate)


def _counted(rate: Rate | None) -> Cell:
    cell = rate_table_cell(rate)
    return cell if rate is None else Cell(f"{cell.shown} <small>n={rate.n}</small>", cell.sort)
