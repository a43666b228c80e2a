"""A fleet: many adapters of one base, repaired one after the other by a process that loads the base once.

Base, guard, what the base answers (``oneshot.patch.teacher``) and the choice of the example are the same for all of
them; the example is chosen for the first. Every adapter gets a run folder of its own, as if repaired alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.lock import released, take
from oneshot.distributed.phases import clock, phase
from oneshot.errors import Unmet, UserError, first_line
from oneshot.settings import Settings
from oneshot.shared import Shared, for_all, share

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.distributed.runtime import Runtime
    from oneshot.patch.request import Request
    from oneshot.patch.select import Chosen
    from oneshot.report.fleet import Row


@dataclass(frozen=True)
class Ways:
    """How one adapter is repaired; ``oneshot.repair`` has it.

    Attributes:
        check: settings -> the checked request. Collective
        repair: request, run folder, what is shared -> (the example that was taken, report.json). Collective
    """

    check: Callable[[Settings, Runtime], Request]
    repair: Callable[[Request, Path, Console | None, Shared], tuple[Chosen, dict[str, Any]]]


@released()
def run(settings: Settings, ways: Ways, *, quiet: bool = False) -> list[Row]:
    """Repair every adapter that ``model.paths`` names, and write the table of them all. Collective.

    An adapter that cannot be repaired stands in the table with the reason, and the others go on.

    Args:
        quiet: print nothing

    Raises:
        UserError: settings or a base that cannot be worked with; or, once all are through, some were not repaired
        Unmet: all were, and some outcomes are not what the settings require
    """
    from oneshot.distributed.runtime import agree, gather_objects, start
    from oneshot.report.fleet import FLEET, print_rows, write_rows
    from oneshot.report.members import check_one_base
    from oneshot.report.progress import open_console, progress

    _refuse(settings)
    runtime = start()
    console = None if quiet else open_console(runtime)
    folder, names = _opened(settings, runtime)
    owns = {name: _own(settings, folder / name, place, runtime) for name, place in names.items()}
    check_one_base(runtime, [own.model for own in owns.values() if isinstance(own, Settings)])
    rows: list[Row] = []
    with progress(console):
        for row in _repaired(owns, folder, names, ways, runtime, console):
            rows.append(row)
            with agree(runtime, "writing the fleet's table"):
                if runtime.is_main:
                    write_rows(folder, rows, len(names))
    if console:
        print_rows(rows, console)
        console.print(f"Table: {folder / FLEET}", highlight=False, markup=False, soft_wrap=True)
    rows = gather_objects(runtime, rows)[0]  # rank 0 has the reports
    failed = [row for row in rows if row.problem]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} adapters were not repaired, the first being {failed[0].adapter} "
            f"({failed[0].problem.rstrip('.')}): mend them and go on with --resume --out {folder}."
        )
    if unmet := [row.name for row in rows if settings.require not in (None, row.outcome)]:
        raise Unmet(
            f"{len(unmet)} of {len(rows)} outcomes are not {settings.require!r}, which --require asks for: "
            f"{', '.join(unmet)}; {folder / FLEET} has the figures."
        )
    return rows


def _refuse(settings: Settings) -> None:
    """Raise UserError for settings that only make sense for one model."""
    for name in ("finetune_first", "log_with", "push_to_hub"):
        if getattr(settings, name):
            raise UserError(f"Setting {name} is for one model: leave it out with model.paths, or give model.path.")
    if settings.delete_degraded:
        raise UserError(
            "Setting delete_degraded removes only what a run itself fine-tuned, never adapters that are given as "
            "--model.paths: leave it out, and remove those adapters yourself."
        )


def _opened(settings: Settings, runtime: Runtime) -> tuple[Path, dict[str, Path]]:
    """The fleet's folder, and name -> adapter folder, the same on every rank. Collective."""
    from oneshot.distributed.runtime import agree, gather_objects
    from oneshot.report.finished import short_names
    from oneshot.report.fleet import FLEET
    from oneshot.report.members import matched
    from oneshot.report.runfolder import new_folder

    found: tuple[str, list[str]] = ("", [])
    with agree(runtime, "opening the fleet's folder"):
        if runtime.is_main:
            places = matched(str(settings.model.paths))
            out = None if settings.out is None else Path(settings.out)
            if out is not None and (out / FLEET).exists() and not settings.resume:
                raise UserError(f"Folder {out} already holds a fleet: go on with --resume, or give another.")
            if out is not None and out.resolve() in [
                parent for p in places for parent in (p.resolve(), *p.resolve().parents)
            ]:
                raise UserError(
                    f"--out {out} would put runs among the adapters: give a folder that holds none of them."
                )
            out = new_folder(settings.out, settings.name or "fleet")
            take(out)
            found = (str(out), [str(place) for place in places])
    folder, listed = gather_objects(runtime, found)[0]
    names = short_names([Path(os.path.abspath(place)) for place in listed])
    return Path(folder), {name: Path(place) for name, place in zip(names, listed)}


def _own(settings: Settings, run_dir: Path, place: Path, runtime: Runtime) -> Settings | UserError:
    """The settings of one adapter's own run, Hub ids at their commits; or why it has none. Collective."""
    from oneshot.checkpoint.loading.pinned import pinned
    from oneshot.distributed.runtime import agree

    model = dataclasses.replace(settings.model, path=str(place), paths=None)
    own = dataclasses.replace(settings, model=model, out=str(run_dir), name=None)
    try:
        with agree(runtime, "looking up the base"):
            own = pinned(own)
    except UserError as error:
        return error
    return own


def _repaired(
    owns: dict[str, Settings | UserError], folder: Path, adapters: dict[str, Path], ways: Ways, runtime: Runtime,
    console: Console | None,
) -> Iterator[Row]:  # fmt: skip
    """Repair one after the other; the base is loaded for the first that can be begun."""
    from oneshot.report.fleet import Row, row_of
    from oneshot.report.runfolder import REPORT

    def say(text: str) -> None:
        if console:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    def failed(error: UserError) -> Row:
        say(f"Not repaired: {error}")
        return Row(name, str(place), problem=first_line(error))

    shared: Shared | None = None
    before: dict[str, Any] | None = None  # the example of those that are through
    with contextlib.ExitStack() as stack:
        for number, (name, place) in enumerate(adapters.items(), start=1):
            say(f"\n[{number}/{len(adapters)}] {place}")
            run_dir, own = folder / name, owns[name]
            try:
                if isinstance(own, UserError):
                    raise own
                report = _finished(own, run_dir, runtime)
                to_do = 0 if shared else sum(not (folder / other / REPORT).is_file() for other in adapters)
                request = _begun(own, ways, runtime, shared, to_do) if report is None else None
            except UserError as error:
                yield failed(error)
                continue
            if request is None:
                say("It was repaired before.")
                before = before or ((report or {}).get("example") and {"of": name, **(report or {})["example"]})
                yield row_of(name, place, run_dir, report or {})
                continue
            shared = shared or stack.enter_context(share(request, before))  # what fails here fails for all
            try:
                chosen, report = _timed(ways, request, run_dir, console, shared)
            except UserError as error:
                yield failed(error)
                continue
            shared = shared if shared.chosen else dataclasses.replace(shared, chosen=for_all(chosen, name))
            yield row_of(name, place, run_dir, report)


def _timed(
    ways: Ways, request: Request, run_dir: Path, console: Console | None, shared: Shared
) -> tuple[Chosen, dict[str, Any]]:
    """Repair one on a clock of its own."""
    with clock(detailed=request.settings.profile):
        return ways.repair(request, run_dir, console, shared)


def _finished(settings: Settings, run_dir: Path, runtime: Runtime) -> dict[str, Any] | None:
    """The report of an adapter that is through, the same on every rank; none where there is none. Collective.

    Raises:
        UserError: the folder holds the repair of another adapter, or the adapter has changed since
    """
    from oneshot.distributed.runtime import agree, gather_objects
    from oneshot.report.members import finished_report
    from oneshot.report.runfolder import REPORT
    from oneshot.stages import reads

    report: dict[str, Any] | None = None
    with agree(runtime, "reading what was repaired before"):
        if runtime.is_main and (run_dir / REPORT).is_file():
            report = finished_report(run_dir, settings, partial(reads, "repair"))
    found: dict[str, Any] | None = gather_objects(runtime, report)[0]
    return found


def _begun(settings: Settings, ways: Ways, runtime: Runtime, shared: Shared | None, to_do: int) -> Request:
    """The checked request of one adapter, whose run folder is opened; the first is one of so many to do. Collective."""
    from oneshot.checkpoint.disk.files import stored_bytes
    from oneshot.distributed.runtime import agree
    from oneshot.report.members import OF, digests
    from oneshot.report.preflight import look_around
    from oneshot.report.resume import begin_anew
    from oneshot.report.runfolder import open_run, write_json
    from oneshot.stages import reads

    with phase("check"):
        request = ways.check(settings, runtime)
        method = request.recipe.method
        if request.adapter is None:
            raise UserError(f"{settings.model.path} is no adapter: repair a checkpoint alone, with --model.path.")
        if method.cost.trains != "nothing":
            raise UserError(f"Method {method.name} trains a model: it repairs adapters one by one, with --model.path.")
        if shared is not None and _words(shared.request.tokenizer) != _words(request.tokenizer):
            raise UserError(
                f"The tokenizer or chat template of {settings.model.path} differs from that of "
                f"{shared.request.settings.model.path}: repair it alone, with --model.path."
            )
        run_dir = open_run(settings.out, settings.called, settings, runtime, partial(reads, "repair"))
        begin_anew(runtime, settings, run_dir)
        with agree(runtime, "noting which adapter it is"):
            if runtime.is_main:
                write_json(run_dir / OF, digests(Path(str(settings.model.path))))
        if shared is None:
            merged = to_do * stored_bytes(request.source.checkpoint) if settings.repair.merge else 0
            look_around(runtime, settings.preflight, run_dir, merged, request.source.checkpoint, None)
    return request


def _words(tokenizer: Any) -> tuple[dict[str, int], str | None]:
    return tokenizer.get_vocab(), tokenizer.chat_template
