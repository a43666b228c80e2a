"""``oneshot STAGE --launch NAME ...``: the stage on several processes, started by accelerate with a shipped file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from oneshot.errors import UserError
from oneshot.reading import load_yaml
from oneshot.shipped import launch_file

LAUNCHED = ("repair", "finetune", "score", "spectrum", "export")  # the stages that several processes share
_FLAG = "--launch"


def taken_out(argv: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Take the words for the launcher out of a stage's: ``--launch NAME`` and ``--launch.KEY VALUE``.

    Returns:
        NAME or None, accelerate's options (``--KEY=VALUE``, or ``--KEY`` where no value follows), and the other words

    Raises:
        UserError: ``--launch`` without a name, or options for a launcher that is not asked for
    """
    name: str | None = None
    options, rest = [], []
    words = iter(zip(argv, [*argv[1:], "--"]))
    for word, following in words:
        flag, equals, value = word.partition("=")
        if flag != _FLAG and not flag.startswith(f"{_FLAG}."):
            rest.append(word)
            continue
        if not equals and not following.startswith("--"):
            value = following
            next(words)
        if flag == _FLAG:
            name = value
        else:
            option = f"--{flag.removeprefix(f'{_FLAG}.')}"
            options.append(f"{option}={value}" if value else option)
    if name == "" or (options and name is None):
        raise UserError("Setting launch is missing: give --launch a name, as zero3; oneshot list shows them.")
    return name, options, rest


def command(stage: str, name: str, options: list[str], words: list[str]) -> list[str]:
    """Return the command that starts a stage under accelerate.

    Args:
        name: a launch file that ships, or the path of the user's own
        options: accelerate's, which win over the file's
        words: the stage's own

    Raises:
        UserError: the stage runs in one process only, or there is no such launch file
    """
    if stage not in LAUNCHED:
        raise UserError(f"oneshot {stage} runs in one process: leave --launch out.")
    path = launch_file(name)
    # as a module: the console script may not be on PATH, and carries an absolute path
    start = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(path)]
    return [*start, *_deepspeed(path), *options, "-m", f"oneshot.{stage}", *words]


def become(arguments: list[str]) -> NoReturn:
    """Replace this process by the command: signals and exit codes are the launcher's own."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # a module is looked up in the current folder first, where a user's file could shadow one (Python 3.11 and later)
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # DeepSpeed looks there for ninja, which an environment that is not activated has beside Python alone
    beside = os.path.dirname(arguments[0])
    os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), beside]))
    os.execv(arguments[0], arguments)


def _deepspeed(path: Path) -> list[str]:
    """Accelerate takes the DeepSpeed file of its YAML from the current folder; ours stand beside ``launch``."""
    import yaml

    try:
        content = load_yaml(path.read_text(encoding="utf-8")) or {}
        named = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    except (yaml.YAMLError, AttributeError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no accelerate file: take one that oneshot list shows as a model.") from error
    beside = path.resolve().parent.parent / named if named else None
    return ["--deepspeed_config_file", str(beside)] if beside and beside.is_file() else []
