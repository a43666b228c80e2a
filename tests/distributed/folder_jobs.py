"""Runs that meet in one folder, are killed, or find the disk full."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from oneshot.checkpoint.disk.files import MARKER
from oneshot.checkpoint.merging import merge
from oneshot.commandline import parse
from oneshot.distributed import runtime as runtime_module
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.report import runfolder

# the stages' modules: the package's own names are functions
export, repair, finetune = (importlib.import_module(f"oneshot.{name}") for name in ("export", "repair", "finetune"))
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def run(runtime: Runtime, stage: str, argv: list[str], seconds: float = 0.0) -> str:
    """Run a stage, or an export, each event or share of it slowed down by so much; returns its refusal, or ""."""
    runtime_module.start = lambda *_: runtime  # type: ignore[assignment]  # joined already
    told, share = runfolder.append_event, merge._write_share

    def slow_event(*arguments: Any, **fields: Any) -> None:
        told(*arguments, **fields)
        time.sleep(seconds)

    def slow_share(*arguments: Any) -> Any:
        time.sleep(seconds)
        return share(*arguments)

    runfolder.append_event, merge._write_share = slow_event, slow_share
    try:
        if stage == "export":
            export.run(argv)
        else:
            {"repair": repair, "finetune": finetune}[stage].run(parse(argv, stage), quiet=True)
    except UserError as error:
        return f"{error.code}: {error}"
    finally:
        runfolder.append_event, merge._write_share = told, share
    return ""


def on_a_full_disk(runtime: Runtime, argv: list[str], disk: str) -> dict[str, Any]:
    """Repair where a small file system has no room for the lock, for settings.yaml, for the patch, and then has some.

    Returns:
        what was said, and what the run's folder held afterwards, each time; nothing where no file system can be mounted
    """
    place = Path(disk)
    if ctypes.CDLL(None).unshare(_NEW_MOUNTS) != 0:
        return {}
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]):
        if subprocess.run(command, check=False).returncode != 0:
            return {}
    found: dict[str, Any] = {}
    for name, left in (("lock", 0), ("settings", 4096), ("patch", 40_000), ("enough", 4_000_000)):
        _fill(place / "filler", left)
        said = run(runtime, "repair", [*argv, "--out", f"{disk}/run"])
        there = sorted(path.name for path in (place / "run").iterdir()) if (place / "run").exists() else []
        found[name] = {"said": said, "there": there}
    found["marked"] = (place / "run" / "patch" / MARKER).exists()
    return found


def _fill(path: Path, left: int) -> None:
    """Leave so many bytes free, in whole pages."""
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as stream:
        stream.write(b"x" * max(0, free - left))
