"""Everything that a finished run says of itself, written together: for programs, for browsers, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oneshot.measure.rates import StageScores
from oneshot.report.answers import write_answers
from oneshot.report.markdown import write_markdown
from oneshot.report.page import write_page
from oneshot.report.runfolder import write_report
from oneshot.report.times import write_profile


def write_outputs(
    run_dir: Path,
    report: Mapping[str, Any],
    stages: Mapping[str, StageScores],
    publish: Callable[[], None] | None = None,
) -> None:
    """Write all files of the report; report.json comes last, as it says that the run is finished.

    Args:
        report: as ``build_report`` makes it
        stages: what was scored, with the answers
        publish: hands out what was made, last but for report.json
    """
    answers = {stage: scores.answers for stage, scores in stages.items()}
    write_answers(run_dir, answers)
    write_page(run_dir, report, answers)
    write_markdown(run_dir, report)
    write_profile(run_dir, report["resources"])
    if publish is not None:
        publish()
    write_report(run_dir, report)
