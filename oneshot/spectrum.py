"""Spectrum of the safety gradient: how few directions hold it, who shares them, and what it stands against.

Run: ``accelerate launch oneshot/spectrum.py`` (the toy world: its aligned model is fine-tuned first), or
``accelerate launch --config_file launch/zero3.yaml oneshot/spectrum.py --model.path DIR --data.harmful FILE``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
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
    from oneshot.patch.measured import Asked, Found


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot spectrum`` and ``accelerate launch oneshot/spectrum.py``."""
    from oneshot.commandline import run_stage

    run_stage(argv, "spectrum", run)


@timed
@released()
def run(settings: Settings) -> None:
    """Measure the settings' model into a new run folder; first fine-tune it, where they say so. Collective."""
    from oneshot.checkpoint.loading.pinned import pinned
    from oneshot.distributed.resources import where_time_went
    from oneshot.distributed.runtime import start
    from oneshot.errors import UserError
    from oneshot.finetune import finetune_first
    from oneshot.patch.measured import measure
    from oneshot.report.progress import open_console, progress, say_dtype
    from oneshot.report.runfolder import open_run

    if settings.delete_degraded:
        raise UserError("Setting delete_degraded belongs to repair, which measures the model first: leave it out.")
    runtime = start()
    settings = pinned(settings)
    console = open_console(runtime)
    if settings.finetune_first:
        damaged = finetune_first(runtime, settings, "-spectrum", lambda later: check_fully(later, runtime), console)
        asked, run_dir = check_fully(damaged.settings, runtime), damaged.run_dir
    else:
        asked = check_fully(settings, runtime)
        run_dir = open_run(settings.out, f"{Path(settings.called).name}-spectrum", settings, runtime)
        say_dtype(console, asked.request.source)
    clock = time.perf_counter()
    with progress(console):
        found = measure(asked)
    seconds = round(time.perf_counter() - clock, 2)
    times = where_time_went(runtime)
    if console:
        _show(asked, found, run_dir, {"seconds": seconds, **times}, console)


@phase("check")
def check_fully(settings: Settings, runtime: Runtime) -> Asked:
    """Read and check everything that can be wrong before a model is loaded or a file is written."""
    from oneshot.patch.check import check
    from oneshot.patch.measured import prepared
    from oneshot.planning.check import refuse_what_cannot_fit

    options = dataclasses.replace(settings.repair, method="project", guard_weight=1.0, watch=False)
    request = check(dataclasses.replace(settings, repair=options), runtime)
    refuse_what_cannot_fit(
        settings, runtime, request.source.checkpoint, request.recipe.method.name, item=request.source.dtype.itemsize
    )
    return prepared(request)


def _show(asked: Asked, found: Found, run_dir: Path, times: dict[str, Any], console: Console) -> None:
    """Print the table; write spectrum.json and spectrum.html."""
    from oneshot.report.spectrum import JSON, console_table, sweep_table, write_spectrum
    from oneshot.report.times import print_times, write_profile
    from oneshot.versions import versions

    settings, example = asked.request.settings, found.example
    facts = {
        "model": settings.called,
        "world_size": asked.request.runtime.world_size,
        "seed": settings.seed,
        "example": {"id": example.id, "prompt": example.prompt[-1]["content"], "response": example.response},
        "groups": {name: len(each) for name, each in found.spectrum.each.items()},
        "notes": asked.notes,
        **times,
        "versions": versions(),
    }
    write_profile(run_dir, times)
    page = write_spectrum(run_dir, found.spectrum, facts, found.sweep)
    console.print(console_table(found.spectrum))
    if found.sweep:
        console.print(sweep_table(found.sweep))
    for note in asked.notes:
        console.print(f"Note: {note}", highlight=False)
    print_times(times, console)
    console.print(f"Figures: {page}\nAll values: {run_dir / JSON}", highlight=False)


if __name__ == "__main__":
    main()
