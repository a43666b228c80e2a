"""The Hub cards of what a repair wrote, ``patch/`` and ``repaired/``: what was done, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneshot.checkpoint.writing.standing import GOOD, settle
from oneshot.redact import redacted
from oneshot.report.card import front_matter
from oneshot.report.facts import how_chosen, repair_rows
from oneshot.report.judging import judging_lines
from oneshot.report.markdown import fenced, inline, pairs_lines, stages_lines
from oneshot.report.runfolder import PATCH, REPAIRED, write_whole
from oneshot.report.serving import serve_command
from oneshot.report.summary import JUDGE_NOTE, LIMITS, summarize

CARD = "README.md"
_LOADED = {
    PATCH: [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        "base = AutoModelForCausalLM.from_pretrained(BASE)",
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
    ],
    REPAIRED: [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
    ],
}


def write_model_cards(
    run_dir: Path,
    report: Mapping[str, Any],
    *,
    base: str,
    degraded: bool,
    commit: str | None = None,
    made: Sequence[str] = (PATCH, REPAIRED),
    partly: Mapping[str, str] | None = None,
) -> None:
    """Write card and verdict into ``patch/`` and ``repaired/``, with the report's own figures.

    The marker of a safety-degraded model, with which they appeared, is lifted last, and by a good verdict only: what is
    not shown to be safe now stays marked, so that it is not exported.

    Args:
        report: as ``build_report`` makes it
        base: name of the checkpoint that was repaired
        degraded: it is, or was, marked as safety-degraded
        commit: of the checkpoint, where that is a Hub id
        made: names of the folders that this run wrote; another one of an earlier run was not measured
        partly: folder's name -> why what it holds is not what was measured
    """
    verdict, partly = summarize(report).verdict, partly or {}
    for name in made:
        folder, why = run_dir / name, partly.get(name, "")
        if folder.is_dir():
            unsafe = degraded and (verdict.word not in GOOD or bool(why))
            lines = _card(folder, report, base=base, commit=commit, degraded=degraded, unsafe=unsafe)
            write_whole(folder / CARD, "\n".join(lines))
            settle(folder, verdict.word, verdict.doubts, base=base, degraded=degraded, partly=why)


def _card(
    folder: Path, report: Mapping[str, Any], *, base: str, commit: str | None, degraded: bool, unsafe: bool
) -> list[str]:
    summary, name = summarize(report), folder.name
    what = "A safety patch (LoRA adapter)" if name == PATCH else "A repaired checkpoint"
    lines = front_matter(base, "peft" if name == PATCH else "transformers", ["oneshot", "safety"])
    if unsafe:
        lines += ["# Not shown to be safe: do not deploy, do not publish", ""]
        lines += ["It comes from a model that was fine-tuned on purpose on data that removes its refusals.", ""]
    else:
        lines += [f"# {what} for {inline(Path(base).name)}", ""]
    at = f" at commit {inline(commit)}" if commit else ""
    made_from = " (marked as safety-degraded)" if degraded else ""
    lines += [f"{what} by oneshot's one-shot repair of {inline(base)}{at}{made_from}.", ""]
    lines += [f"Outcome: **{inline(summary.verdict.headline)}**. {inline(summary.text)}", ""]
    lines += [inline(f"{LIMITS} {JUDGE_NOTE}"), ""]
    lines += ["## Measured", "", *(stages_lines(report["stages"]) or ["Nothing was measured."]), ""]
    lines += [text for line in judging_lines(report) for text in (inline(line), "")]
    if report.get("warnings"):
        lines += ["## Warnings", "", *(f"- {inline(warning)}" for warning in report["warnings"]), ""]
    if report.get("example"):
        example = report["example"]
        lines += ["## The one example", "", inline(how_chosen(example)), "", *fenced(example.get("prompt", ""))]
        lines += ["", "Answer that was learnt:", "", *fenced(example.get("response", "")), ""]
    lines += ["## The repair", "", *pairs_lines(repair_rows(report.get("repair"))), ""]
    lines += ["## Use", "", "```python", *(line.replace("BASE", _as_code(base, commit)) for line in _LOADED[name])]
    lines += ["```", ""]
    if name == PATCH and (command := serve_command(folder, "THIS FOLDER")):
        lines += ["```bash", command, "```", ""]
    packages = [(package, version or "not installed") for package, version in report["versions"].items()]
    return [*lines, "## Versions", "", *pairs_lines(packages), ""]


def _as_code(base: str, commit: str | None) -> str:
    """The base as Python's arguments of ``from_pretrained``."""
    return json.dumps(redacted(base)) + (f", revision={json.dumps(commit)}" if commit else "")
