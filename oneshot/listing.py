"""``oneshot list``: everything that is taken by its name - settings, attacks, prompt sets, launch files, methods."""

from __future__ import annotations

import argparse
from pathlib import Path

from oneshot.shipped import launch_file, launch_names, settings_file, settings_names

PROG = "oneshot list"
DESCRIPTION = "List what is taken by its name: run settings, attacks, prompt sets, launch files, repair methods."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot list``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Print each kind with the flag that takes its names."""
    parser().parse_args(argv)
    for number, (title, entries) in enumerate(sections().items()):
        print(f"{'' if number == 0 else chr(10)}{title}")
        width = max(map(len, entries)) + 2
        for name, line in entries.items():
            print(f"  {name:{width}}{line}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    return CommandParser(PROG, DESCRIPTION)


def sections() -> dict[str, dict[str, str]]:
    """Return name and line of all that ships, by kind."""
    from oneshot.patch.methods import METHODS
    from oneshot.patch.recipe import AUTO

    methods = {name: method.summary for name, method in METHODS.items()}
    settings = {name: first_line(settings_file(name)) for name in settings_names()}
    return {
        "Run settings: --config NAME": {name: line for name, line in settings.items() if "/" not in name},
        "Attacks, for oneshot finetune and the toy: --config NAME": _below("attacks/", settings),
        "Prompt sets, for oneshot score: --config NAME": _below("prompts/", settings),
        "Several processes: --launch NAME": {name: first_line(launch_file(name)) for name in launch_names()},
        "Repair methods: --repair.method NAME": {
            AUTO: "the first of these that can be had and has a reason to be taken",
            **methods,
        },
    }


def first_line(path: Path) -> str:
    """Return the first line of a YAML file's comment, which says what the file is."""
    with path.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("#").strip()


def _below(folder: str, settings: dict[str, str]) -> dict[str, str]:
    return {name: line for name, line in settings.items() if name.startswith(folder)}
