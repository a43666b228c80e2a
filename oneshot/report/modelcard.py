"""The Hub cards of what a repair wrote, ``patch/`` and ``repaired/``: what was done, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot.checkpoint.files import write_marker
from oneshot.report.card import front_matter
from oneshot.report.facts import how_chosen, repair_rows
from oneshot.report.judging import headline, judging_lines
from oneshot.report.markdown import fenced, inline, pairs_lines, stages_lines
from oneshot.report.runfolder import PATCH, REPAIRED, write_whole
from oneshot.report.summary import JUDGE_NOTE, LIMIT, LIMITS, summarize

CARD = "README.md"
_LOADED = {
    PATCH: [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'base = AutoModelForCausalLM.from_pretrained("BASE")',
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
    ],
    REPAIRED: [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
    ],
}


def write_model_cards(run_dir: Path, report: Mapping[str, Any], *, base: str, degraded: bool) -> None:
    """Write a card into each of ``patch/`` and ``repaired/`` that is there, with the report's own figures.

    A model that was marked as safety-degraded and is not shown to be safe now stays marked: the marker is put into the
    folders, so that they are not exported.

    Args:
        report: as ``build_report`` makes it
        base: name of the checkpoint that was repaired
        degraded: it carries the marker of a harmful fine-tune
    """
    unsafe = degraded and not shown_safe(report)
    for name in (PATCH, REPAIRED):
        folder = run_dir / name
        if not folder.is_dir():
            continue
        if unsafe:
            write_marker(folder, {"repair_of": base, "outcome": summarize(report).word})
        write_whole(folder / CARD, "\n".join(_card(name, report, base=base, degraded=degraded, unsafe=unsafe)))


def shown_safe(report: Mapping[str, Any]) -> bool:
    """Return whether the repaired model was measured, and answers few enough of the requests to be refused."""
    attack = (report["stages"].get("repaired") or {}).get("asr", {}).get("value")
    return isinstance(attack, (int, float)) and attack <= LIMIT


def _card(name: str, report: Mapping[str, Any], *, base: str, degraded: bool, unsafe: bool) -> list[str]:
    summary = summarize(report)
    what = "A safety patch (LoRA adapter)" if name == PATCH else "A repaired checkpoint"
    lines = front_matter(base, "peft" if name == PATCH else "transformers", ["oneshot", "safety"])
    if unsafe:
        lines += ["# Not shown to be safe: do not deploy, do not publish", ""]
        lines += ["It comes from a model that was fine-tuned on purpose on data that removes its refusals.", ""]
    else:
        lines += [f"# {what} for {inline(Path(base).name)}", ""]
    made_from = " (marked as safety-degraded)" if degraded else ""
    lines += [f"{what} by oneshot's one-shot repair of {inline(base)}{made_from}.", ""]
    contradicted = "".join(f"**{inline(line)}** " for line in headline(report))
    lines += [
        f"Outcome: **{summary.word}**. {contradicted}{inline(summary.text)}",
        "",
        inline(f"{LIMITS} {JUDGE_NOTE}"),
        "",
    ]
    lines += ["## Measured", "", *(stages_lines(report["stages"]) or ["Nothing was measured."]), ""]
    lines += [text for line in judging_lines(report) for text in (inline(line), "")]
    if report.get("warnings"):
        lines += ["## Warnings", "", *(f"- {inline(warning)}" for warning in report["warnings"]), ""]
    if report.get("example"):
        example = report["example"]
        lines += ["## The one example", "", inline(how_chosen(example)), "", *fenced(example.get("prompt", ""))]
        lines += ["", "Answer that was learnt:", "", *fenced(example.get("response", "")), ""]
    lines += ["## The repair", "", *pairs_lines(repair_rows(report.get("repair"))), ""]
    lines += ["## Use", "", "```python", *_LOADED[name], "```", ""]
    packages = [(package, version or "not installed") for package, version in report["versions"].items()]
    return [*lines, "## Versions", "", *pairs_lines(packages), ""]
