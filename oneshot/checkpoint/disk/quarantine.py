"""Removing what a run made unsafe on purpose, once it has been measured: this run's own folders, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from oneshot.checkpoint.disk.files import MARKER, is_degraded, read_json
from oneshot.errors import UserError


def check_own(run_dir: Path, names: list[str]) -> None:
    """Raise UserError if one of the folders to be removed after a run is there before it: then it is not the run's.

    Args:
        run_dir: folder of a run that has not begun
        names: of folders in it
    """
    for name in names:
        if (run_dir / name).exists() or (run_dir / name).is_symlink():
            raise UserError(
                f"Setting delete_degraded removes {run_dir / name} after measuring, which was there before this run: "
                "give another --out, or move that folder away."
            )


def remove_degraded(run_dir: Path, checkpoint: str, states: str) -> list[Path]:
    """Remove the degraded checkpoint that a run wrote, and its training states, which hold the same weights.

    Nothing is removed unless the checkpoint carries the marker of a harmful fine-tune, and no link is followed. Call
    it on one rank, with a folder for which ``check_own`` was called before the run wrote into it.

    Args:
        run_dir: the run's folder
        checkpoint: name of the checkpoint's folder in it
        states: name of the folder of its training states

    Returns:
        the folders removed

    Raises:
        UserError: a link stands in the place of a folder, the marker is missing, or the disk refuses
    """
    folder, before = run_dir / checkpoint, run_dir / states
    for path in (folder, before):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and what it leads to is not this run's: remove it yourself.")
    marker = read_json(folder / MARKER) if is_degraded(folder) else None
    if not isinstance(marker, dict) or marker.get("safety_degraded") is not True:
        raise UserError(f"{folder} does not carry the marker {MARKER}: it is not removed; remove it yourself.")
    removed = []
    for path in (before, folder):  # the marker goes last
        if path.is_dir():
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise UserError(f"{path} could not be removed ({error.strerror}): remove it yourself.") from error
            removed.append(path)
    return removed
