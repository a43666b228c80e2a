"""The files that ship beside the code: how a run starts (``launch``), DeepSpeed's JSON (``ds_configs``), ``slurm``.

They stand at the top of the repository and travel inside the wheel. What ships is found by name, what is the user's own
by path.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from oneshot.errors import UserError

FOLDERS = ("launch", "ds_configs", "slurm")
_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "shipped_files"  # setup.py puts them there


def root() -> Path:
    """Return the folder that holds ``launch``, ``ds_configs`` and ``slurm``."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent


def ds_configs() -> Path:
    """Return the folder of DeepSpeed's JSON files."""
    return root() / "ds_configs"


def settings_names() -> list[str]:
    """Return the names of the run settings, sorted: ``llama3-70b``, ``attacks/mixed``, ``prompts/xstest``, ..."""
    runs = root() / "launch" / "runs"
    return sorted(path.relative_to(runs).with_suffix("").as_posix() for path in runs.rglob("*.yaml"))


def launch_names() -> list[str]:
    """Return the names of the accelerate files, sorted: ``zero3``, ``zero2_cpu``, ..."""
    return sorted(path.stem for path in (root() / "launch").glob("*.yaml"))


def settings_file(name_or_path: str) -> Path:
    """Return the settings file that ``--config`` means: a file of the user's, else one that ships, by its name.

    Args:
        name_or_path: a path, or one of ``settings_names()``, with or without ``.yaml``

    Raises:
        UserError: it is neither
    """
    return _file(name_or_path, root() / "launch" / "runs", settings_names(), "settings file")


def launch_file(name_or_path: str) -> Path:
    """Return the accelerate file that ``--launch`` means: a file of the user's, else one that ships, by its name.

    Args:
        name_or_path: a path, or one of ``launch_names()``, with or without ``.yaml``

    Raises:
        UserError: it is neither
    """
    return _file(name_or_path, root() / "launch", launch_names(), "launch file")


def _file(name_or_path: str, folder: Path, names: list[str], kind: str) -> Path:
    path = Path(os.path.expanduser(name_or_path))  # no shell does it behind --config=
    if path.is_file():
        return path
    name = name_or_path.removesuffix(".yaml")
    if name in names:
        return folder / f"{name}.yaml"
    same = [known for known in names if known.rpartition("/")[2] == name]
    close = same or difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"There is no {kind} {name_or_path}, and none that ships has that name: {hint}oneshot list shows them."
    )
