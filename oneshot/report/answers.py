"""The answers, stage by stage: on the page side by side, and as answers.jsonl for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.measure.judge import JUDGE
from oneshot.measure.rates import EXACT_MATCH
from oneshot.redact import without_secrets
from oneshot.report import figures
from oneshot.report.markup import escaped
from oneshot.report.plain import one_line, plain, shortened
from oneshot.report.runfolder import write_whole

ANSWERS = "answers.jsonl"
HARMFUL_CHARACTERS = 200
ANSWER_CHARACTERS = 2_000
PROMPT_CHARACTERS = 500
SHOWN_PER_KIND = 100
_KINDS = {
    "should_refuse": "Requests that should be refused",
    "harmless": "Harmless requests",
    "lookalike": "Look-alikes: harmless requests that sound like the former",
    "utility": "General ability",
    "task": "The fine-tune's task",
}
Rows = Sequence[Mapping[str, Any]]


def write_answers(run_dir: Path, answers: Mapping[str, Rows]) -> Path:
    """Write answers.jsonl, one line per stage and probe: stage, id, kind, group, prompt, answer, verdict, correct."""
    found = without_secrets([{"stage": stage, **row} for stage, rows in answers.items() for row in rows])
    lines = [json.dumps(row, ensure_ascii=True) for row in found]  # an answer may hold half a surrogate
    return write_whole(run_dir / ANSWERS, "".join(f"{line}\n" for line in lines), private=True)


def answers_section(answers: Mapping[str, Rows]) -> str:
    """Return the answers as folded HTML, the stages of each probe side by side; "" for none.

    Args:
        answers: by stage
    """
    by_kind: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for stage, rows in answers.items():
        for row in rows:
            by_kind.setdefault(row["kind"], {}).setdefault(row["id"], {})[stage] = row
    order = sorted(by_kind, key=lambda kind: list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS))
    return "".join(_kind(kind, by_kind[kind], list(answers)) for kind in order)


def stage_dot(stages: Iterable[str], stage: str) -> str:
    """Return the dot in a stage's colour."""
    return f'<span class="dot s{figures.series_of(stages)[stage]}"></span>'


def _kind(kind: str, probes: Mapping[str, Mapping[str, Mapping[str, Any]]], stages: Sequence[str]) -> str:
    harmful = kind == "should_refuse"
    most = HARMFUL_CHARACTERS if harmful else ANSWER_CHARACTERS
    blocks = []
    for rows in list(probes.values())[:SHOWN_PER_KIND]:
        prompt = escaped(shortened(plain(next(iter(rows.values()))["prompt"]), PROMPT_CHARACTERS))
        columns = "".join(_answer(stage, rows[stage], stages, most) for stage in stages if stage in rows)
        side_by_side = f'<div class="answers">{columns}</div>'
        if harmful:
            says = " · ".join(f"{escaped(stage)}: {escaped(_says(rows[stage]))}" for stage in stages if stage in rows)
            head = f'<bdi class="text">{prompt}</bdi><span class="soft">{says}</span>'
            blocks.append(f'<details class="fold"><summary>{head}</summary><div>{side_by_side}</div></details>')
        else:
            blocks.append(f'<div class="probe"><p class="text" dir="auto">{prompt}</p>{side_by_side}</div>')
    left_out = len(probes) - len(blocks)
    notes = [f"Answers are cut after {most:,} characters."] if harmful else []
    notes += [f"{left_out} more are left out of this page; {ANSWERS} has all."] if left_out else []
    note = f'<p class="soft">{escaped(" ".join(notes))}</p>' if notes else ""
    heading = f'{escaped(_KINDS.get(kind, kind))} <span class="n">({len(probes)})</span>'
    counted = f'<span class="soft">{_counted(list(probes.values()), stages)}</span>'
    return f'<details class="fold"><summary>{heading}{counted}</summary><div>{note}{"".join(blocks)}</div></details>'


def _counted(probes: Sequence[Mapping[str, Mapping[str, Any]]], stages: Sequence[str]) -> str:
    """How often each stage did what, as HTML."""
    said = []
    for stage in stages:
        counts = Counter(_word(rows[stage]) for rows in probes if stage in rows)
        if counts:
            said.append(f"{escaped(stage)}: {', '.join(f'{n} {escaped(word)}' for word, n in counts.most_common())}")
    return " · ".join(said)


def _answer(stage: str, row: Mapping[str, Any], stages: Iterable[str], most: int) -> str:
    wrong = "" if row["correct"] else " wrong"
    answer = escaped(shortened(plain(row["answer"]), most))
    opinions = "".join(f"; {one_line(judge)}: {one_line(o['label'])}" for judge, o in row.get("opinions", {}).items())
    return (
        f"<div>{stage_dot(stages, stage)}<strong>{escaped(stage)}</strong> "
        f'<span class="verdict{wrong}">{escaped(_says(row) + opinions)}</span>'
        f'<p class="text" dir="auto">{answer}</p></div>'
    )


def _word(row: Mapping[str, Any]) -> str:
    if row["kind"] in EXACT_MATCH:
        return "right" if row["correct"] else "wrong"
    return str(row["verdict"])


def _says(row: Mapping[str, Any]) -> str:
    return _word(row) if row["kind"] in EXACT_MATCH else f"{_word(row)} ({JUDGE})"
