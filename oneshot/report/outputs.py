"""Everything that a finished run says of itself, written together: for programs, for browsers, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot.measure.rates import StageScores
from oneshot.report.answers import write_answers
from oneshot.report.markdown import write_markdown
from oneshot.report.page import write_page
from oneshot.report.runfolder import write_report


def write_outputs(run_dir: Path, report: Mapping[str, Any], stages: Mapping[str, StageScores]) -> None:
    """Write report.html, report.md, answers.jsonl and, last as it says that the run is finished, report.json.

    Args:
        report: as ``build_report`` makes it
        stages: what was scored, with the answers
    """
    answers = {stage: scores.answers for stage, scores in stages.items()}
    write_answers(run_dir, answers)
    write_page(run_dir, report, answers)
    write_markdown(run_dir, report)
    write_report(run_dir, report)
