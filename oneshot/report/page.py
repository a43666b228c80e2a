"""report.html: one self-contained page that says what was measured, shows it and lets one look into the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.measure.intervals import Rate
from oneshot.measure.judge import JUDGE
from oneshot.patch.path import SAFE_MARGIN
from oneshot.report import facts, figures, path_figures
from oneshot.report.answers import answers_section, stage_dot
from oneshot.report.judging import judging_lines
from oneshot.report.markup import (
    Cell,
    document,
    escaped,
    figures_grid,
    pairs,
    section,
    table,
    warnings_section,
)
from oneshot.report.opening import deploy_lines, numbers, run_rows
from oneshot.report.runfolder import PAGE, SETTINGS, write_whole
from oneshot.report.spectrum import read_spectrum
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
    rate_texts,
)
from oneshot.report.times import SHOWN, time_rows, times_caption

_TONES = {"repaired": "good", "repaired, with doubts": "open", "was not broken": "open", "not shown": "open"}
_SETTINGS_CHARACTERS = 100_000


def write_page(
    run_dir: Path,
    report: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Path:
    """Write report.html and return its path. A spectrum.json in the folder gets a section of its own.

    Args:
        report: as ``build_report`` makes it
        answers: by stage, the answers of its ``StageScores``
    """
    summary = summarize(report)
    title = f"Safety report: {report['model']}"
    tone = _TONES.get(summary.word, "bad")
    stages = report["stages"]
    judging = "".join(f'\n<p class="soft">{escaped(line)}</p>' for line in judging_lines(report))
    judged = "repaired" in report["stages"]  # of a score there is no verdict, and nothing to deploy
    word = f'<p class="word {tone}">{escaped(summary.verdict.headline)}</p>' if judged else ""
    body = [
        f"<h1>{escaped(title)}</h1>",
        word,
        _numbers(stages),
        f"<p>{escaped(summary.lead)}</p>",
        f'<details class="printed"><summary>What these words mean</summary><div><p>{escaped(LIMITS)}</p>'
        f"<p>{escaped(JUDGE_NOTE)}</p></div></details>",
        section("This run" + ", and how to deploy it" * judged, _run(report, run_dir, summary.word)),
        warnings_section(report.get("warnings") or []),
        section("Measures by stage", (_stages(stages, CAPTION) or "<p>Nothing was measured.</p>") + judging),
        section("Further figures", _stages(report.get("figures") or {}, FIGURES)),
        section("Figures", _figures(report)),
        section("What changed between stages", differences_table(report.get("differences") or [], "first", "second")),
        section("Agreement of judges", _agreement(report.get("agreement") or {})),
        section("The one example", _example(report.get("example"))),
        section("The repair", pairs(facts.repair_rows(report.get("repair")))),
        section("Spectrum of the safety gradient", read_spectrum(run_dir) or ""),
        section("Answers, stage by stage", answers_section(answers)),
        section("Resources", _resources(report.get("resources") or {})),
        section("Settings and versions", _settings(run_dir) + pairs(facts.version_rows(report))),
    ]
    return write_whole(run_dir / PAGE, document(title, body))


def rate_table_cell(rate: Rate | None) -> Cell:
    """Return a rate with its interval as a cell that sorts by the rate."""
    value, interval = rate_texts(rate)
    shown = f"{value} <small>{escaped(interval)}</small>" if interval else value
    return Cell(shown, rate.value if rate is not None and interval else "-")


def differences_table(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> str:
    """Return rows of ``compare_stages`` as HTML; "" for none.

    Args:
        first, second: what the two that are compared are called in the heads
    """
    if not rows:
        return ""
    cells: list[list[Cell | str]] = [list(map(escaped, row)) for row in differences_rows(rows)]
    heads = [escaped(head) for head in differences_heads(first, second)]
    return f'{table(heads, cells)}\n<p class="soft">{escaped(PAIRED)}</p>'


def _numbers(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    tiles = "".join(
        f'<div><b>{escaped(one.shown)}</b><span class="soft">{escaped(one.name)} (n = {one.after.n})</span></div>'
        for one in numbers(stages)
    )
    return f'<div class="numbers">{tiles}</div>' if tiles else ""


def _run(report: Mapping[str, Any], run_dir: Path, word: str) -> str:
    lines = deploy_lines(report, run_dir, word)
    shown = f'<pre class="box">{escaped(chr(10).join(lines))}</pre>' if lines else ""
    return pairs(run_rows(report)) + shown


def _stages(stages: Mapping[str, Mapping[str, Mapping[str, Any]]], caption: str) -> str:
    names = ordered_rates(name for rates in stages.values() for name in rates)
    if not names:
        return ""
    heads = ["measure", *(stage_dot(stages, stage) + escaped(stage) for stage in stages), "n"]
    rows: list[list[Cell | str]] = []
    for name in names:
        rates = [as_rate(stage.get(name)) for stage in stages.values()]
        cells = [rate_table_cell(rate) for rate in rates]
        count = count_cell(rates)  # a narrow window has no room for its column
        rows.append([f'{escaped(measure_name(name))}<small class="count">n = {count}</small>', *cells, count])
    return f'{table(heads, rows, "counts")}\n<p class="soft">{escaped(caption_of(names, caption))}</p>'


def _agreement(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows: list[list[Cell | str]] = [
        [
            escaped(stage), escaped(" and ".join(row["judges"])), escaped(row["n"]), facts.number(row["agree"]),
            facts.number(row["kappa"]), escaped(", ".join(row["differ"][:10]) or "-"),
        ]
        for stage, found in stages.items()
        for row in found
    ]  # fmt: skip
    heads = ["stage", "judges", "n", "agree", "Cohen's kappa", "differ on"]
    return table(heads, rows) if rows else ""


def _figures(report: Mapping[str, Any]) -> str:
    repair = report.get("repair") or {}
    trace, kept = repair.get("trace") or [], repair.get("kept")
    margin = f"{SAFE_MARGIN:g} nats"
    return figures_grid(
        [
            (figures.rates_figure(report["stages"]), f"Rates by stage with 95% intervals; refusals judged by {JUDGE}."),
            (
                path_figures.path_figure(trace, kept),
                "The path, by epoch, on unlabelled prompts that the repair does not learn from: by how much the "
                "refusal is ahead of the unpatched model's answer (10th percentile), and the share of prompts in "
                f"which it is by {margin} (dotted). The ring marks the epoch that was kept.",
            ),
            (
                path_figures.plane_figure(trace, kept, repair.get("bounds")),
                "Safety against utility along the same path: up is safer, left is nearer to the unpatched model. "
                "Dotted: the bounds of a good epoch, where they are near.",
            ),
            (path_figures.trace_figure(trace), "What the repair minimised, epoch by epoch."),
        ]
    )


def _example(example: Mapping[str, Any] | None) -> str:
    if not example:
        return ""
    return (
        f"<p>{escaped(facts.how_chosen(example))}</p>\n<blockquote>"
        f'<p class="soft">Request</p><p class="text" dir="auto">{escaped(example.get("prompt", ""))}</p>'
        f'<p class="soft">Answer that was learnt</p><p class="text" dir="auto">{escaped(example.get("response", ""))}'
        f"</p></blockquote>{_candidates(example.get('selection') or {})}"
    )


def _candidates(selection: Mapping[str, Any]) -> str:
    heads, rows = facts.candidate_rows(selection)
    if not rows:
        return ""
    cells: list[list[Cell | str]] = [
        [escaped(name), *(Cell(facts.number(v), "-" if v is None else v) for v in values)] for name, values in rows
    ]
    shown = table([escaped(head) for head in heads], cells)
    summary = f"{len(rows)} candidates, in the order of the choice"
    says = f'<p class="soft">{escaped(facts.CHOICE)}</p>'
    return f'<details class="printed"><summary>{summary}</summary><div>{says}{shown}</div></details>'


def _resources(resources: Mapping[str, Any]) -> str:
    heads, rows = time_rows(resources)
    cells: list[list[Cell | str]] = [
        [escaped(name), *(Cell(shown, "-" if by is None else by) for shown, by in each)] for name, each in rows
    ]
    times = f'{table(heads, cells)}\n<p class="soft">{escaped(times_caption(resources))}</p>\n' if rows else ""
    return times + pairs(facts.resource_rows({name: one for name, one in resources.items() if name not in SHOWN}))


def _settings(run_dir: Path) -> str:
    path = run_dir / SETTINGS
    if not path.is_file():
        return ""
    written = path.read_text(encoding="utf-8", errors="replace")[:_SETTINGS_CHARACTERS]
    return f'<details class="printed"><summary>{SETTINGS}</summary><pre>{escaped(written)}</pre></details>'
