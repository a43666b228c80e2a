"""A run that goes on in its folder: what an interrupted attempt left that is done again is removed first."""

from __future__ import annotations

import json
from pathlib import Path

from oneshot.checkpoint.disk.folders import clean_inside, discard
from oneshot.distributed.runtime import Runtime, agree
from oneshot.report.runfolder import EVENTS, PATCH, REPAIRED, SELECTION
from oneshot.settings import Settings
from oneshot.whole import write_whole


def begin_anew(runtime: Runtime, settings: Settings, run_dir: Path) -> None:
    """Remove what an interrupted repair left, if this run goes on with it. Collective."""
    with agree(runtime, "removing what an interrupted repair left"):
        if settings.resume and runtime.is_main:
            forget_attempt(run_dir)


def forget_attempt(run_dir: Path) -> None:
    """Remove what an unfinished repair wrote, its markers and cards included; it begins anew. On rank 0."""
    clean_inside(run_dir)
    if not (run_dir / EVENTS).exists():  # nobody has been here: what bears these names is not ours
        return
    for name in (PATCH, REPAIRED):
        folder = run_dir / name
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            discard(folder)
    (run_dir / SELECTION).unlink(missing_ok=True)
    forget_events(run_dir, "repair", 0)


def forget_events(run_dir: Path, stage: str, first: int) -> None:
    """Take those of events.jsonl that come again: a stage's from a step (or epoch) on, and half a line. On rank 0."""
    path = run_dir / EVENTS
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = [line for line in text.splitlines(keepends=True) if not _comes_again(line, stage, first)]
    if "".join(kept) != text:
        write_whole(path, "".join(kept))


def _comes_again(line: str, stage: str, first: int) -> bool:
    try:
        event = json.loads(line)
        at = event.get("step", event.get("epoch"))
        return not line.endswith("\n") or (event["stage"] == stage and at >= first)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return True
