"""Push a finished repair to the Hub: the patch, the repaired checkpoint, and the report without answers.

Run: ``oneshot push RUN OWNER/NAME``; ``--dry_run`` lists what would be sent and sends nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

PROG = "oneshot push"
DESCRIPTION = "Push a finished repair to the Hub, into a private repository unless asked otherwise."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot push``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Push, or list what would be."""
    options = parser().parse_args(argv)
    from oneshot.online import go_offline
    from oneshot.report.hub import Push, check_push, listed, parcels, send
    from oneshot.shown import open_console

    go_offline(options.offline)
    push = Push(options.repo, options.push_public, options.push_degraded)
    check_push(push, dry=options.dry_run)
    sent, console = parcels(options.run, push), open_console()
    for line in ["Would be sent:" if options.dry_run else "Sending:", *listed(sent, push)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for address in [] if options.dry_run else send(sent, push):
        console.print(f"Pushed: {address}", highlight=False, markup=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(PROG, DESCRIPTION)
    add = made.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a finished repair")
    add("repo", metavar="OWNER/NAME", help="repository of the patch; a repaired checkpoint goes to OWNER/NAME-repaired")
    add("--push_public", action="store_true", help="for everybody to see")
    add("--push_degraded", action="store_true", help="also what is marked as safety-degraded; never public")
    add("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    add("--offline", action="store_true", help="send nothing: only --dry_run goes with it")
    return made


if __name__ == "__main__":
    main()
