"""Score a checkpoint (plus adapter) or a served model alone: attack success, over-refusal, utility, task.

Run: ``accelerate launch oneshot/score.py --model.path DIR``, DIR being a checkpoint or an adapter on its base; or
``oneshot score --score.endpoint.url URL`` for a model behind an OpenAI-compatible server.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.checkpoint.disk.lock import released
from oneshot.distributed.phases import phase, timed
from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.distributed.runtime import Runtime
    from oneshot.measure.overlap import Overlap
    from oneshot.measure.rates import StageScores
    from oneshot.patch.scoring import Scored
    from oneshot.report.runfolder import Run


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot score`` and ``accelerate launch oneshot/score.py``."""
    from oneshot.commandline import run_stage, spoken

    run_stage(argv, "score", partial(run, command=spoken("score", argv)))


@dataclass(frozen=True)
class Finished:
    """A finished scoring.

    Attributes:
        stages: the model's scores, by the one name ``model``
        warnings: what a reader of the figures should know
        report: what report.json holds, on rank 0; empty on the others
    """

    scored: Scored
    stages: dict[str, StageScores]
    warnings: list[str]
    report: dict[str, Any]


@timed
@released()
def run(settings: Settings, *, quiet: bool = False, command: str = "oneshot.score(...)") -> Finished:
    """Score the settings' model or server into a new run folder, or go on in an old one. Collective.

    Args:
        quiet: print nothing
        command: what made the run, for its report

    Raises:
        UserError: settings, files or a server that cannot be worked with
    """
    from oneshot.checkpoint.loading.pinned import pinned
    from oneshot.distributed.resources import measured, where_time_went
    from oneshot.distributed.runtime import agree, start
    from oneshot.errors import UserError
    from oneshot.measure.further import ask_judges, check_judges, report_fields
    from oneshot.measure.harness import check_tasks
    from oneshot.measure.overlap import find_overlaps, overlap_warnings, training_requests
    from oneshot.measure.probes import collect_probes
    from oneshot.patch.scoring import score_local, score_served
    from oneshot.report.progress import open_console, progress, say_dtype
    from oneshot.report.runfolder import Run
    from oneshot.settings import to_dict

    runtime = start()
    console = None if quiet else open_console(runtime)
    served = settings.score.endpoint.url is not None
    settings = settings if served else pinned(settings)
    if served and runtime.world_size > 1:
        raise UserError("A server is asked by one process: start oneshot score without a launcher.")
    if served and settings.score.text is not None:
        raise UserError("Setting score.text needs the model's weights, which a server does not give: leave it out.")
    overlaps: list[Overlap] = []
    with phase("check"):
        probes = collect_probes(settings)
        check_tasks(settings.score, runtime)
        check_judges(runtime, settings.score)
        with agree(runtime, "reading the training data"):
            if runtime.is_main:
                overlaps = find_overlaps(probes, training_requests(settings))
    clock = time.perf_counter()
    opened, tell = partial(_open, runtime, settings), partial(say_dtype, console)
    with progress(console):
        if served:
            scored = score_served(runtime, settings, probes, opened)
        else:
            scored = score_local(runtime, settings, probes, opened, tell)
        stages, warnings = ask_judges(runtime, scored.run_dir, settings.score, scored.probes, {"model": scored.scores})
    seconds = {"score": round(time.perf_counter() - clock, 2)}
    resources = {"seconds": seconds, **measured(runtime), **where_time_went(runtime)}
    warnings = [*scored.warnings, *warnings, *overlap_warnings(overlaps, len(probes))]
    made = Run(scored.name, runtime.world_size, settings.seed, command, to_dict(settings))
    fields = report_fields(settings.score, stages, overlaps, thinks=scored.thinks)
    report = _report(made, scored, stages, resources, fields, warnings) if runtime.is_main else {}
    finished = Finished(scored, stages, warnings, report)
    if console:
        _show(finished, console)
    return finished


def _open(runtime: Runtime, settings: Settings, name: str) -> Path:
    """The run folder; with --resume that of a scoring of the same model, finished or not, is gone on in. Collective."""
    from oneshot.checkpoint.disk.files import read_json
    from oneshot.distributed.runtime import agree
    from oneshot.errors import UserError
    from oneshot.report.runfolder import REPORT, open_run

    if settings.resume and settings.out is not None:
        out = Path(settings.out)
        with agree(runtime, f"going on in {out}"):
            if runtime.is_main and (out / REPORT).is_file():
                report = read_json(out / REPORT)
                if not isinstance(report, dict) or report.get("repair"):
                    raise UserError(f"{out} holds a repair, not a scoring: give another --out.")
    return open_run(settings.out, name, settings, runtime, _counts, finished=True)


def _counts(setting: str) -> bool:
    """Whether a setting says which model is scored; how it is asked and judged is free to change, as an answer on disk
    is named after all that it depends on.
    """
    from oneshot.stages import reads

    if setting.startswith("score."):
        return setting in ("score.endpoint.url", "score.endpoint.model")
    return reads("score", setting)


def _report(
    made: Run,
    scored: Scored,
    stages: dict[str, StageScores],
    resources: dict[str, Any],
    fields: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Write the report in all its forms, and return it.

    Args:
        fields: of ``report_fields``
    """
    from oneshot.report.outputs import write_outputs
    from oneshot.report.runfolder import build_report

    report = build_report(
        made,
        example=None,
        stages=stages,
        repair=None,
        resources=resources,
        warnings=warnings,
    )
    report |= {**fields, "fingerprint": scored.fingerprint}
    write_outputs(scored.run_dir, report, stages)
    return report


def _show(finished: Finished, console: Console) -> None:
    """Print the table."""
    from oneshot.report.judging import print_judging
    from oneshot.report.runfolder import PAGE
    from oneshot.report.table import print_stages
    from oneshot.report.times import print_times

    stages = finished.stages
    print_stages({s: dataclasses.replace(f, rates=f.rates | f.others) for s, f in stages.items()}, console)
    print_judging(finished.report, console)
    for warning in finished.warnings:
        console.print(f"Note: {warning}", highlight=False, markup=False)
    print_times(finished.report["resources"], console)
    console.print(f"Report: {finished.scored.run_dir / PAGE}", highlight=False)


if __name__ == "__main__":
    main()
