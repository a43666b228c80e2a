"""report.html: one self-contained page that says what was measured, shows it and lets one look into the answers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.measure.intervals import Rate
from oneshot.measure.judge import JUDGE
from oneshot.report import figures
from oneshot.report.runfolder import PAGE, SETTINGS, write_whole
from oneshot.report.style import CSS
from oneshot.report.summary import JUDGE_NOTE, LIMITS, summarize
from oneshot.report.table import CAPTION, count_cell, measure_name, ordered_rates

HARMFUL_CHARACTERS = 200
SHOWN_PER_KIND = 100
_KINDS = {
    "should_refuse": "Requests that should be refused",
    "harmless": "Harmless requests",
    "lookalike": "Look-alikes: harmless requests that sound like the former",
    "utility": "General ability",
    "task": "The fine-tune's task",
}
_TONES = {"repaired": "good", "was not broken": "open", "not shown": "open"}
# Nothing may be loaded or run, whatever an answer holds and should the escaping ever fail.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(
    run_dir: Path,
    report: Mapping[str, Any],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    harmful_characters: int = HARMFUL_CHARACTERS,
) -> Path:
    """Write report.html and return its path.

    Args:
        report: as ``build_report`` makes it
        answers: by stage, the answers of its ``StageScores``
        harmful_characters: how much is shown of an answer to a request that should be refused
    """
    summary = summarize(report)
    title = f"Safety report: {report['model']}"
    tone = _TONES.get(summary.word, "bad")
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="word {tone}">{_text(summary.word)}</p>',
        f"<p>{_text(summary.text)}</p>",
        f'<p class="soft">{_text(LIMITS)} {_text(JUDGE_NOTE)}</p>',
        _warnings(report.get("warnings") or []),
        _section("Measures by stage", _stages(report["stages"])),
        _section("Figures", _figures(report)),
        _section("The one example", _example(report.get("example"))),
        _section("The repair", _pairs(_repair_rows(report.get("repair")))),
        _section("Answers, stage by stage", _answers(answers, harmful_characters)),
        _section("Resources", _pairs(_resource_rows(report.get("resources") or {}))),
        _section("Settings and versions", _settings(run_dir) + _pairs(_version_rows(report))),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    return write_whole(run_dir / PAGE, page)


def _text(value: Any) -> str:
    """Every string that the page did not write itself goes through here."""
    return html.escape(str(value), quote=True)


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>\n{content}</section>" if content else ""


def _warnings(warnings: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return _section("Warnings", f"<ul>{items}</ul>") if items else ""


def _stages(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    names = ordered_rates(name for rates in stages.values() for name in rates)
    if not names:
        return "<p>Nothing was measured.</p>"
    head = "".join(f'<th scope="col">{_dot(stages, stage)}{_text(stage)}</th>' for stage in stages)
    rows = []
    for name in names:
        rates = [_rate(stage.get(name)) for stage in stages.values()]
        cells = "".join(f"<td>{_cell(rate)}</td>" for rate in rates)
        rows.append(f'<tr><th scope="row">{_text(measure_name(name))}</th>{cells}<td>{count_cell(rates)}</td></tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">measure</th>{head}'
        f'<th scope="col">n</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        f'<p class="soft">{_text(CAPTION)}</p>'
    )


def _cell(rate: Rate | None) -> str:
    if rate is None or rate.n == 0:
        return "-"
    return f"{rate.value:.3f} <small>[{rate.low:.2f}, {rate.high:.2f}]</small>"


def _rate(fields: Mapping[str, Any] | None) -> Rate | None:
    if fields is None or fields.get("value") is None:
        return None
    return Rate(value=fields["value"], low=fields["low"], high=fields["high"], n=fields["n"])


def _figures(report: Mapping[str, Any]) -> str:
    trace = (report.get("repair") or {}).get("trace") or []
    drawn = [
        (figures.rates_figure(report["stages"]), f"Rates by stage with 95% intervals; refusals judged by {JUDGE}."),
        (figures.trace_figure(trace), "The repair, epoch by epoch."),
    ]
    shown = [f"<figure>{svg}<figcaption>{_text(says)}</figcaption></figure>" for svg, says in drawn if svg]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def _example(example: Mapping[str, Any] | None) -> str:
    if not example:
        return ""
    how = f"Example {example.get('id')}, selected by: {example.get('selected_by')}"
    score = example.get("score")
    how += f" (score {score:.4g})." if isinstance(score, float) else f" (score {score})." if score is not None else "."
    return (
        f"<p>{_text(how)}</p>\n<blockquote>"
        f'<p class="soft">Request</p><p class="text">{_text(example.get("prompt", ""))}</p>'
        f'<p class="soft">Answer that was learnt</p><p class="text">{_text(example.get("response", ""))}</p>'
        "</blockquote>"
    )


def _answers(answers: Mapping[str, Sequence[Mapping[str, Any]]], harmful_characters: int) -> str:
    by_kind: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for stage, rows in answers.items():
        for row in rows:
            by_kind.setdefault(row["kind"], {}).setdefault(row["id"], {})[stage] = row
    order = sorted(by_kind, key=lambda kind: list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS))
    return "".join(_kind(kind, by_kind[kind], answers, harmful_characters) for kind in order)


def _kind(
    kind: str, probes: Mapping[str, Mapping[str, Mapping[str, Any]]], stages: Iterable[str], harmful_characters: int
) -> str:
    harmful = kind == "should_refuse"
    blocks = []
    for rows in list(probes.values())[:SHOWN_PER_KIND]:
        prompt = next(iter(rows.values()))["prompt"]
        columns = "".join(
            _answer(stage, rows[stage], stages, harmful_characters if harmful else None)
            for stage in stages
            if stage in rows
        )
        side_by_side = f'<div class="answers">{columns}</div>'
        if harmful:
            blocks.append(f"<details><summary>{_text(prompt)}</summary><div>{side_by_side}</div></details>")
        else:
            blocks.append(f'<div class="probe"><p class="text">{_text(prompt)}</p>{side_by_side}</div>')
    left_out = len(probes) - len(blocks)
    notes = [f"Answers are cut after {harmful_characters} characters."] if harmful else []
    notes += [f"{left_out} more are left out of this page."] if left_out else []
    note = f'<p class="soft">{_text(" ".join(notes))}</p>' if notes else ""
    heading = f"{_text(_KINDS.get(kind, kind))} <span class='n'>({len(probes)})</span>"
    return f"<details><summary>{heading}</summary><div>{note}{''.join(blocks)}</div></details>"


def _answer(stage: str, row: Mapping[str, Any], stages: Iterable[str], limit: int | None) -> str:
    answer = str(row["answer"])
    if limit is not None and len(answer) > limit:
        answer = answer[:limit].rstrip() + " …"
    wrong = "" if row["correct"] else " wrong"
    exact = row["kind"] in ("utility", "task")
    says = ("right" if row["correct"] else "wrong") if exact else f"{row['verdict']} ({JUDGE})"
    return (
        f"<div>{_dot(stages, stage)}<strong>{_text(stage)}</strong> "
        f'<span class="verdict{wrong}">{_text(says)}</span><p class="text">{_text(answer)}</p></div>'
    )


def _dot(stages: Iterable[str], stage: str) -> str:
    return f'<span class="dot s{figures.series_of(stages)[stage]}"></span>'


def _pairs(rows: Sequence[tuple[str, Any]]) -> str:
    cells = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll" tabindex="0"><table class="pairs"><tbody>{cells}</tbody></table></div>' if rows else ""


def _repair_rows(repair: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), _number(value)) for name, value in (repair or {}).items() if name != "trace"]


def _resource_rows(resources: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in resources.items():
        show = _gib if name.endswith("_bytes") else _number
        label = name.removesuffix("_bytes").replace("_", " ").replace("rss", "RSS").replace("gpu", "GPU")
        if isinstance(value, Mapping):
            rows += [(f"{label}, {part}", show(amount)) for part, amount in value.items()]
        elif isinstance(value, (list, tuple)):
            rows += [(f"{label}, rank {rank}", show(amount)) for rank, amount in enumerate(value)]
        else:
            rows.append((label, show(value)))
    return rows


def _version_rows(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    run = [("ranks", report["world_size"]), ("seed", report["seed"])]
    return run + [(name, version or "not installed") for name, version in (report.get("versions") or {}).items()]


def _settings(run_dir: Path) -> str:
    path = run_dir / SETTINGS
    if not path.is_file():
        return ""
    written = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>{SETTINGS}</summary><pre>{_text(written)}</pre></details>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _gib(value: Any) -> str:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, (int, float)) else "-"
