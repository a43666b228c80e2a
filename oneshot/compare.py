"""Compare finished runs: rates side by side, what differs probe by probe, and the settings that differ.

Run: ``oneshot compare RUN RUN ...``; needs no GPU and loads no model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from oneshot.errors import UserError

PROG = "oneshot compare"
DESCRIPTION = "Put finished runs side by side, the first one being what the others are compared with."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot compare``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Print the comparison, and write it as compare.html and compare.md."""
    options = parser().parse_args(argv)
    if len(options.runs) < 2:
        raise UserError("There is nothing to compare: name two runs or more.")
    from oneshot.report.comparison import compared, print_comparison, write_comparison
    from oneshot.report.finished import read_runs
    from oneshot.report.runfolder import new_folder
    from oneshot.shown import open_console

    found = compared(read_runs(options.runs))
    console = open_console()
    print_comparison(found, console)
    for path in write_comparison(new_folder(options.out, "compare"), found):
        console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(PROG, DESCRIPTION)
    made.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="folder of a finished run, or its report.json")
    made.add_argument("--out", metavar="DIR", help="folder for compare.html and compare.md (a new one under runs/)")
    return made


if __name__ == "__main__":
    main()
