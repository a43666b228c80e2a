"""The one owner of the run folder's layout: settings.yaml, events.jsonl, report.json and report.html."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from oneshot import settings as settings_module
from oneshot.checkpoint.disk import lock
from oneshot.distributed.runtime import Runtime, gather_objects
from oneshot.errors import UserError
from oneshot.measure.judge import JUDGE
from oneshot.measure.paired import compare_stages
from oneshot.measure.rates import StageScores
from oneshot.redact import redacted
from oneshot.settings import Settings
from oneshot.versions import versions
from oneshot.whole import disk_full, is_full, remove_halves
from oneshot.whole import write_whole as write_whole  # for who writes into a run folder

RUNS = "runs"
SETTINGS, EVENTS, REPORT, PAGE = "settings.yaml", "events.jsonl", "report.json", "report.html"
SELECTION, PATCH, REPAIRED = "selection.json", "patch", "repaired"
SCHEMA = 1


def open_run(
    out: str | None,
    model_name: str,
    settings: Settings,
    runtime: Runtime,
    counts: Callable[[str], bool] = lambda name: True,
    *,
    finished: bool = False,
) -> Path:
    """Create the run folder, lock it and write the settings into it; a collective: call it on every rank.

    Args:
        out: the folder; none takes the first free ``runs/<model_name>-N``
        model_name: a name, a Hub id or a path, of which the last part counts
        counts: whether a setting, by its full name, must be the same for the run to be gone on with
        finished: whether a finished run may be gone on with; its report stays until another takes its place

    Returns:
        the folder, the same on every rank; only rank 0 touches the disk. It stays locked until the end of the function
        that ``lock.released`` decorates

    Raises:
        UserError: on every rank alike, where the folder holds another run, is another run's or cannot be created
    """
    decision, failed = ("", ""), UserError
    if runtime.is_main:
        try:
            decision = (str(_create(out, model_name, settings, counts, finished)), "")
        except UserError as error:
            decision, failed = ("", str(error)), type(error)
    # Shared before anyone raises: a rank that is alone in failing would leave the others waiting.
    path, problem = gather_objects(runtime, decision)[0]
    if problem:
        raise failed(problem)
    return Path(path)


def new_folder(out: str | None, name: str) -> Path:
    """Return a folder for files of ours that are no run: ``out``, made where it is missing, else ``runs/<name>-N``.

    Raises:
        UserError: it cannot be made
    """
    try:
        if out is None:
            return _first_free(name)
        out = os.path.expanduser(out)  # of --out=~/compared no shell does it
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = out if out is not None else RUNS
        raise UserError(
            f"Cannot create the folder {where} ({error.strerror or error}): give --out a writable folder."
        ) from error
    return Path(out)


def append_event(run_dir: Path, **fields: Any) -> None:
    """Append one line to events.jsonl, on disk before this returns; call it on rank 0.

    A ``time`` field (seconds since 1970) is added where there is none; numbers that JSON lacks become null. A run whose
    folder another one has taken over (it looked dead) ends here.
    """
    lock.still_held(run_dir)
    line = json.dumps(_json_value({"time": round(time.time(), 3), **fields}), ensure_ascii=False, allow_nan=False)
    try:
        with (run_dir / EVENTS).open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(line + "\n")
    except OSError as error:
        if is_full(error):
            raise disk_full(run_dir / EVENTS, len(line)) from error
        raise


@dataclass(frozen=True)
class Run:
    """What was run: name or path of the model, on how many processes, from which seed, by what command and settings."""

    model: str
    world_size: int
    seed: int
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def build_report(
    run: Run,
    *,
    example: Mapping[str, Any] | None,
    stages: Mapping[str, StageScores],
    repair: Mapping[str, Any] | None,
    resources: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return report.json's content.

    Args:
        example: id, prompt, response, selected_by and score of the one example; none where nothing was repaired
        stages: scores by stage: aligned, finetuned, repaired
        repair: method, rank, epochs, stopped_by, watch and trace (a list of {epoch, loss, ...}); none where there was
            none
        resources: seconds (by stage), peak_rss_bytes (by rank) and peak_gpu_bytes, and those of ``where_time_went``
        warnings: what a reader should know, one sentence each
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **vars(run),
        "judge": JUDGE,
        "example": None if example is None else dict(example),
        "stages": {
            stage: {name: rate.as_dict() for name, rate in scores.rates.items()} for stage, scores in stages.items()
        },
        "differences": compare_stages(stages),
        "repair": None if repair is None else dict(repair),
        "resources": dict(resources),
        "versions": versions(),
        "warnings": list(warnings),
    }


def write_report(run_dir: Path, report: Mapping[str, Any]) -> Path:
    """Write report.json, whole or not at all, with nan and infinities as null; return its path."""
    return write_json(run_dir / REPORT, report)


def write_selection(run_dir: Path, selection: Mapping[str, Any]) -> Path:
    """Write selection.json, how the example was chosen; return its path."""
    return write_json(run_dir / SELECTION, selection)


def write_json(path: Path, value: Mapping[str, Any], *, indent: int = 2) -> Path:
    """Write a value as JSON, whole or not at all, without secrets and with null for nan and infinities."""
    text = json.dumps(_json_value(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")


def _create(
    out: str | None, model_name: str, settings: Settings, counts: Callable[[str], bool], finished: bool
) -> Path:
    try:
        if out is None:
            folder = _first_free(model_name)
            lock.take(folder)
        else:
            folder = Path(out)
            for _ in range(2):  # a folder of another run is left as it is; and while it was being locked one may end
                goes_on = settings.resume and (folder / SETTINGS).is_file()
                if not goes_on:
                    _given(folder)
                lock.take(folder)
            remove_halves(folder)
            if goes_on:
                return _resumed(folder, settings, counts, finished)
        settings_module.write(settings, folder / SETTINGS)
    except OSError as error:
        where = out if out is not None else RUNS
        raise UserError(
            f"Cannot create the run folder {where} ({error.strerror or error}): give --out a writable folder."
        ) from error
    return folder


def _resumed(folder: Path, settings: Settings, counts: Callable[[str], bool], finished: bool) -> Path:
    """The folder of a run with the same settings; those that are free to change are written anew."""
    if not finished and (folder / REPORT).exists():
        raise UserError(f"The run in {folder} is finished: there is nothing to resume.")
    path = folder / SETTINGS
    changed = settings_module.differences(settings_module.read(path), settings, counts)
    if changed:
        raise UserError(
            f"The run in {folder} was begun with other settings ({'; '.join(changed)}): resume with those of "
            f"{SETTINGS}, or give another --out."
        )
    if path.read_text(encoding="utf-8") != settings_module.as_text(settings):
        settings_module.write(settings, path)
    return folder


def _given(folder: Path) -> None:
    """Raise UserError if a run cannot begin in the user's folder."""
    if any((folder / name).exists() for name in (SETTINGS, REPORT)):
        raise UserError(f"Folder {folder} already holds a run: give another --out, or remove the folder first.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --out a folder.")


def _first_free(model_name: str) -> Path:
    last = model_name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"
    number = 1
    while True:
        folder = Path(RUNS) / f"{name}-{number}"
        try:
            # mkdir, not exists(): two runs that start at the same moment must not share a folder.
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _json_value(value: Any) -> Any:
    """The value in JSON's own types, without secrets; scalars of tensors become numbers, nan and infinities None."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(str(key)): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return redacted(str(value))
    return value
