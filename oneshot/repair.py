"""One-shot repair: patch a fine-tuned model with one safety example and show that nothing else moved.

Run: ``accelerate launch oneshot/repair.py`` (the toy world, from aligned model to repaired one), or
``accelerate launch --config_file launch/zero3.yaml oneshot/repair.py --model.path DIR --reference DIR --guard FILE``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
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
    from oneshot.measure.rates import StageScores
    from oneshot.patch.request import Request
    from oneshot.patch.select import Chosen
    from oneshot.patch.teacher import Teacher
    from oneshot.report.show import Repaired
    from oneshot.shared import Shared


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot repair`` and ``accelerate launch oneshot/repair.py``."""
    from oneshot import fleet
    from oneshot.commandline import run_stage, spoken

    command = spoken("repair", argv)
    ways = fleet.Ways(check_apart, partial(_one_of_fleet, command))

    def chosen(settings: Settings) -> None:
        if settings.model.paths:
            fleet.run(settings, ways)
        else:
            run(settings, command=command)

    run_stage(argv, "repair", chosen)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished repair: what it came to, its run folder, and its report (on rank 0; empty on the others)."""

    repaired: Repaired
    run_dir: Path
    report: dict[str, Any]


@timed
@released()
def run(settings: Settings, *, quiet: bool = False, command: str = "oneshot.repair(...)") -> Finished:
    """Repair the settings' model; first fine-tune it, where they say so. Collective.

    Args:
        quiet: print nothing
        command: what made the run, for its report

    Raises:
        UserError: settings, files or machines that cannot be worked with
        Unmet: the repair is finished, and not what the settings require
    """
    from oneshot.checkpoint.disk.quarantine import remove_degraded
    from oneshot.checkpoint.loading.pinned import pinned
    from oneshot.distributed.runtime import agree, start
    from oneshot.errors import UserError
    from oneshot.finetune import finetune_first
    from oneshot.patch.apart import check_named_apart, check_update
    from oneshot.report.hub import look_ahead, push_finished
    from oneshot.report.progress import open_console, progress
    from oneshot.report.resume import begin_anew
    from oneshot.report.trackers import check_installed
    from oneshot.training.finetune import FINETUNED, STATE

    runtime = start()
    if not settings.finetune_first:
        check_named_apart(settings)  # before anything is fetched
    settings = pinned(settings)
    check_installed(settings.log_with)
    console = None if quiet else open_console(runtime)
    look_ahead(runtime, settings)
    if settings.delete_degraded and not settings.finetune_first:
        raise UserError(
            "Setting delete_degraded removes only what this run itself fine-tuned, never a model that is given as "
            "--model.path: leave it out, and remove that model yourself."
        )
    seconds: dict[str, float] = {}
    if settings.finetune_first:
        damaged = finetune_first(runtime, settings, "", lambda later: check_fully(later, runtime), console)
        run_dir, seconds = damaged.run_dir, {"finetune": damaged.seconds}
        with progress(console):
            request = check_fully(damaged.settings, runtime)
            check_update(request)
    else:
        request, run_dir = _begin(settings, runtime, console)
    begin_anew(runtime, settings, run_dir)
    finished = repair(request, run_dir, console, seconds, command)
    if settings.delete_degraded:
        with agree(runtime, "removing the degraded checkpoint"):
            for folder in remove_degraded(run_dir, FINETUNED, STATE) if runtime.is_main else []:
                if not quiet:
                    print(f"Removed, as asked: {folder}", flush=True)
    refuse_unmet(runtime, settings.require, finished)
    push_finished(runtime, settings, finished.run_dir, console)
    return finished


def _begin(settings: Settings, runtime: Runtime, console: Console | None) -> tuple[Request, Path]:
    """The checked request of a model that is given, and its run folder, with all looked at before it is read.

    An adapter that is more than a LoRA is merged into its base there, and the request is of that checkpoint.
    """
    from oneshot.checkpoint.disk.files import stored_bytes
    from oneshot.report.merged import merge_first, to_merge
    from oneshot.report.preflight import look_around
    from oneshot.report.progress import progress, say_dtype
    from oneshot.report.runfolder import open_run
    from oneshot.report.trackers import start_tracking
    from oneshot.stages import reads

    asked = to_merge(settings)
    with progress(console):
        request = check_apart(settings, runtime) if asked is None else check_fully(asked.on(str(asked.base)), runtime)
    run_dir = open_run(settings.out, settings.called, settings, runtime, partial(reads, "repair"))
    if asked is not None:
        with progress(console):
            request = check_apart(merge_first(runtime, asked, run_dir, console), runtime)
    start_tracking(runtime, settings.log_with, run_dir)
    merged = stored_bytes(request.source.checkpoint) if settings.repair.merge else 0
    say_dtype(console, request.source)
    look_around(runtime, settings.preflight, run_dir, merged, request.source.checkpoint, console)
    return request, run_dir


def refuse_unmet(runtime: Runtime, required: str | None, finished: Finished) -> None:
    """Raise Unmet on every rank if the outcome is not the one that is required. Collective."""
    from oneshot.distributed.runtime import gather_objects
    from oneshot.errors import Unmet
    from oneshot.report.runfolder import REPORT

    if required is None:
        return
    outcome: dict[str, Any] = gather_objects(runtime, finished.report.get("outcome") or {})[0]
    if outcome["word"] != required:
        raise Unmet(
            f"The outcome is not {required!r}, which --require asks for, but: {outcome['headline']}; "
            f"{finished.run_dir / REPORT} has the figures."
        )


def check_apart(settings: Settings, runtime: Runtime) -> Request:
    """Return the checked request of a model that is given, which is another than its reference. Collective."""
    from oneshot.patch.apart import check_named_apart, check_update

    check_named_apart(settings)
    request = check_fully(settings, runtime)
    check_update(request)
    return request


@phase("check")
def check_fully(settings: Settings, runtime: Runtime) -> Request:
    """Return the checked request, whose run may fit on this run's devices, too. Collective."""
    from oneshot.patch.check import check
    from oneshot.planning.check import refuse_what_cannot_fit

    request = check(settings, runtime)
    refuse_what_cannot_fit(
        settings, runtime, request.source.checkpoint, request.recipe.method.name, item=request.source.dtype.itemsize
    )
    return request


def repair(
    request: Request,
    run_dir: Path,
    console: Console | None = None,
    seconds: dict[str, float] | None = None,
    command: str = "",
    shared: Shared | None = None,
) -> Finished:
    """Choose, solve and show a checked request, with the run folder's outputs. Collective.

    Args:
        console: of rank 0; none on the others, or to print nothing
        seconds: by stage, of what went before
        command: what made the run
        shared: with other repairs
    """
    from oneshot.distributed.resources import measured, where_time_went
    from oneshot.distributed.runtime import agree
    from oneshot.measure.further import ask_judges
    from oneshot.patch import aligned
    from oneshot.report.progress import progress
    from oneshot.report.show import show

    runtime, settings = request.runtime, request.settings
    if console:
        console.print(f"Method: {request.recipe.method.name} ({request.recipe.reason})", highlight=False)
    clock = time.perf_counter()
    with progress(console):
        stages, teacher = aligned.of_reference(request) if shared is None else (shared.stages, shared.teacher)
    seconds = {**(seconds or {}), **({"aligned": time.perf_counter() - clock} if stages or teacher else {})}
    clock = time.perf_counter()
    with progress(console):
        repaired = _patch(request, teacher, run_dir, shared)
        seconds["repair"] = time.perf_counter() - clock
        stages, warnings = ask_judges(
            runtime, run_dir, settings.score, request.probes, {**stages, **repaired.stages},
            shared.classifier if shared else None,
        )  # fmt: skip
    rounded = {stage: round(spent, 2) for stage, spent in seconds.items()}
    resources = {"seconds": rounded, **measured(runtime), **where_time_went(runtime)}
    repaired = dataclasses.replace(repaired, stages=stages, warnings=warnings, resources=resources, command=command)
    report: dict[str, Any] = {}
    with agree(runtime, "writing the report"):  # a rank that is alone in failing would go on alone in a fleet
        if runtime.is_main:
            report = show(repaired, run_dir, console)
    return Finished(repaired, run_dir, report)


def _one_of_fleet(
    command: str, request: Request, run_dir: Path, console: Console | None, shared: Shared
) -> tuple[Chosen, dict[str, Any]]:
    """``fleet.Ways.repair``."""
    finished = repair(request, run_dir, console, command=command, shared=shared)
    return finished.repaired.choice.chosen, finished.report


def _patch(request: Request, teacher: Teacher | None, run_dir: Path, shared: Shared | None) -> Repaired:
    """Load the model, measure, choose, solve, measure again, and write. Collective."""
    from oneshot.patch import aligned
    from oneshot.patch.bench import opened
    from oneshot.patch.choose import choose_beforehand
    from oneshot.patch.coverage import covered
    from oneshot.patch.write import write_repair
    from oneshot.report.runfolder import PATCH, REPAIRED
    from oneshot.report.show import Repaired
    from oneshot.shared import solved

    stages: dict[str, StageScores] = {}
    with phase("choose"):
        chosen = choose_beforehand(request, teacher) if shared is None else shared.chosen
    with opened(request, teacher, shared.base if shared else None) as bench:
        if shared is None and bench.engine is None:  # else the fleet has them, or the adapter is merged in
            stages |= aligned.of_base(request, bench.model)
        with bench.unpatched() as model:
            stages["finetuned"] = aligned.scored(request, model, "fine-tuned")
        listen = partial(note_epoch, request.runtime, run_dir)
        choice, solution = solved(bench, chosen, listen, lent=shared is not None and chosen is not None)
        with bench.patched(solution.update) as model:
            stages["repaired"] = aligned.scored(request, model, "repaired")
        merged = run_dir / REPAIRED if request.settings.repair.merge else None
        write_repair(bench, solution.update, run_dir / PATCH, merged)
        reach = covered(bench)
    return Repaired(bench.request, choice, solution, bench.linears, stages, coverage=reach)


def note_epoch(runtime: Runtime, run_dir: Path, record: dict[str, Any]) -> None:
    """Write an epoch's record down, on rank 0; what hinders it ends the repair on every rank. Collective."""
    from oneshot.distributed.runtime import agree
    from oneshot.report.runfolder import append_event
    from oneshot.report.trackers import track

    with agree(runtime, "noting an epoch"):
        if runtime.is_main:
            append_event(run_dir, stage="repair", **record)
            track("repair", record["epoch"], record)


if __name__ == "__main__":
    main()
