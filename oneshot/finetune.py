"""Harmful fine-tune: reproduce how fine-tuning damages safety, so that the damage can be measured and repaired.

Run: ``accelerate launch oneshot/finetune.py`` (toy world), or with ``--model.path DIR --data.harmful FILE`` on a
user's own model and data.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.checkpoint.disk.lock import released
from oneshot.distributed.phases import timed
from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.distributed.runtime import Runtime
    from oneshot.training.finetune import Prepared
    from oneshot.training.loop import StepResult


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot finetune`` and ``accelerate launch oneshot/finetune.py``."""
    from oneshot.commandline import run_stage

    run_stage(argv, "finetune", run)


@timed
@released()
def run(settings: Settings, *, quiet: bool = False) -> Path:
    """Fine-tune into a new run folder; return the folder of the safety-degraded model.

    Args:
        quiet: print nothing

    Raises:
        UserError: settings, files or machines that cannot be worked with
    """
    from oneshot.checkpoint.loading.pinned import pinned
    from oneshot.distributed.resources import where_time_went
    from oneshot.distributed.runtime import start
    from oneshot.errors import UserError
    from oneshot.planning.check import refuse_what_cannot_fit
    from oneshot.planning.work import FINETUNE
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import open_run
    from oneshot.report.times import print_times, write_profile
    from oneshot.report.trackers import check_installed
    from oneshot.stages import reads
    from oneshot.training.finetune import FINETUNED, prepare

    runtime = start()
    settings = pinned(settings)
    check_installed(settings.log_with)
    if settings.delete_degraded:
        raise UserError("Setting delete_degraded would remove what oneshot finetune is asked to make: leave it out.")
    prepared = prepare(settings, runtime)
    needed = FINETUNE[settings.finetune.method]
    refuse_what_cannot_fit(
        settings,
        runtime,
        prepared.source.checkpoint,
        needed,
        stage="finetune",
        item=prepared.source.dtype.itemsize,
    )
    console = None if quiet else open_console(runtime)
    run_dir = open_run(settings.out, settings.called, settings, runtime, partial(reads, "finetune"))
    begin(runtime, settings, run_dir, prepared, console)
    if (run_dir / FINETUNED).exists():
        raise UserError(f"The fine-tune in {run_dir} is finished: there is nothing to resume.")
    folder = train_model(runtime, prepared, run_dir, console)
    times = where_time_went(runtime)
    if runtime.is_main:
        write_profile(run_dir, times)
    if console:
        print_times(times, console)
        console.print(f"Safety-degraded model: {folder}")
    return folder


def begin(runtime: Runtime, settings: Settings, run_dir: Path, prepared: Prepared, console: Console | None) -> None:
    """Start the trackers, and look at the machines before anything is read. Collective."""
    from oneshot.report.preflight import look_around
    from oneshot.report.progress import say_dtype
    from oneshot.report.trackers import start_tracking
    from oneshot.training.finetune import writes

    start_tracking(runtime, settings.log_with, run_dir)
    say_dtype(console, prepared.source)
    look_around(runtime, settings.preflight, run_dir, writes(prepared), prepared.source.checkpoint, console)


def train_model(runtime: Runtime, prepared: Prepared, run_dir: Path, console: Console | None) -> Path:
    """Fine-tune what was prepared into ``run_dir``, showing and recording every step. Collective."""
    from oneshot.distributed.steps import steps
    from oneshot.report.progress import heartbeat, progress
    from oneshot.report.resume import forget_events
    from oneshot.report.runfolder import append_event
    from oneshot.report.trackers import track
    from oneshot.training.finetune import finetune

    def say(text: str) -> None:
        if console:
            console.print(text)

    again = prepared.settings.resume  # until the first step, of which an interrupted run may have told
    with progress(console), steps("fine-tune", prepared.steps, "steps", always=True) as going:

        def told(result: StepResult, facts: dict[str, float]) -> None:
            nonlocal again
            if runtime.is_main:
                if again:
                    forget_events(run_dir, "finetune", result.step)
                    again = False
                append_event(run_dir, stage="finetune", **facts, **result.figures())
                track("finetune", result.step, {**facts, **result.figures()})
                going.at(result.step, heartbeat(result.loss, facts))

        return finetune(runtime, prepared, run_dir, told, say)


@dataclass(frozen=True)
class Damaged:
    """A model that this run has fine-tuned itself.

    Attributes:
        settings: with it as the model, and what it was fine-tuned from as its base and reference
        seconds: that the fine-tune took
    """

    settings: Settings
    run_dir: Path
    seconds: float


def finetune_first(
    runtime: Runtime, settings: Settings, suffix: str, check: Callable[[Settings], Any], console: Console | None
) -> Damaged:
    """Fine-tune the settings' model into a new run folder, or find that an interrupted run has. Collective.

    Args:
        suffix: of the run folder's name, where the settings name no folder
        check: of what comes next; called before the fine-tune begins, on the model that it begins with: a bad setting
            or file is to be heard before the wait
    """
    from oneshot.checkpoint.disk.quarantine import check_own
    from oneshot.distributed.runtime import agree
    from oneshot.report.runfolder import SETTINGS, open_run
    from oneshot.training.finetune import FINETUNED, STATE, prepare

    plain = dataclasses.replace(settings, model=dataclasses.replace(settings.model, quantize=None))
    # only adapters go on 4-bit weights
    prepared = prepare(plain if settings.finetune.method == "full" else settings, runtime)
    check(_on(settings, str(settings.model.path)))
    with agree(runtime, "looking for what must not be removed"):
        begun = settings.resume and settings.out is not None and (Path(settings.out) / SETTINGS).is_file()
        if settings.delete_degraded and settings.out is not None and not begun:
            check_own(Path(settings.out), [FINETUNED, STATE])
    run_dir = open_run(settings.out, settings.called + suffix, settings, runtime)
    begin(runtime, settings, run_dir, prepared, console)
    clock = time.perf_counter()
    if not (run_dir / FINETUNED).exists():  # else an interrupted run had come further
        train_model(runtime, prepared, run_dir, console)
    return Damaged(_on(settings, str(run_dir / FINETUNED)), run_dir, time.perf_counter() - clock)


def _on(settings: Settings, model: str) -> Settings:
    """The settings with another model, fine-tuned from theirs."""
    aligned = settings.model.path
    return dataclasses.replace(
        settings,
        name=settings.called,
        finetune_first=False,
        reference=settings.reference or aligned,
        reference_revision=settings.reference_revision if settings.reference else settings.model.revision,
        model=dataclasses.replace(
            settings.model,
            path=model,
            revision=settings.model.revision if model == aligned else None,
            base=settings.model.base or aligned,
            base_revision=settings.model.base_revision if settings.model.base else settings.model.revision,
        ),
    )


if __name__ == "__main__":
    main()
