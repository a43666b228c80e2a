"""Export: merge adapters into a checkpoint, take them out again, or make one patch from others or from two checkpoints.

Run: ``oneshot export --model DIR --adapter PATCH --out OUT``, or with several processes, which share the tensors,
``accelerate launch --config_file launch/zero3.yaml -m oneshot.export --model DIR --adapter PATCH --out OUT``.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

PROG = "oneshot export"
DESCRIPTION = "Merge adapters into a checkpoint, take them out again, or make one adapter from others."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot export`` and ``accelerate launch -m oneshot.export``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Export as the command line says."""
    options = vars(parser().parse_args(argv))
    del options["debug"]
    profile = options.pop("profile")
    from oneshot.online import go_offline
    from oneshot.report.exports import ExportRequest, check_request, export

    go_offline(options.pop("offline"))
    request = ExportRequest(**options)
    check_request(request)  # before a run of many processes is joined
    from oneshot.distributed.phases import clock
    from oneshot.distributed.resources import where_time_went
    from oneshot.distributed.runtime import start
    from oneshot.report.progress import open_console, progress
    from oneshot.report.times import print_times

    with clock(detailed=profile):
        runtime = start()
        console = open_console(runtime)
        with progress(console):
            done = export(runtime, request, shlex.join(["oneshot", "export", *argv]))
        times = where_time_went(runtime)
    if console is not None:
        print_times(times, console)
        for line in [*done.lines, f"{done.kind.capitalize()}: {done.folder}"]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(PROG, DESCRIPTION)
    add = made.add_argument
    each: dict[str, Any] = {"action": "append", "default": []}
    add("--model", metavar="DIR", help="checkpoint to merge into; with --extract: to compare with (folder or Hub id)")
    add("--adapter", metavar="DIR", **each, dest="adapters", help="PEFT LoRA adapter; several are summed")
    add("--weight", metavar="W", type=float, **each, dest="weights", help="of each --adapter, in order (1)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder to write, which must not exist or be empty")
    add("--base", choices=("original", "dequantized"), help="merge into the weights as they are, or as NF4 leaves them")
    add("--double_quant", action="store_true", help="with --base dequantized: the scales were quantized, too")
    add("--subtract", action="store_true", help="take the adapters out of a merged checkpoint")
    add("--rank", metavar="K", type=int, help="of the adapter to write, without --model or with --extract")
    add("--rank_experts", metavar="K", type=int, help="of its factors of experts; with --extract 1, else as --rank")
    add("--expert_form", choices=("2d", "3d"), help="experts one by one (2d) or together (3d) in the adapter to write")
    add("--extract", metavar="DIR", help="write what this checkpoint has more than --model as an adapter")
    add("--force", action="store_true", help="use patches that belong to another model")
    add("--trust_remote_code", action="store_true", help="run the model's own Python code to build its config")
    add("--offline", action="store_true", help="fetch nothing from the Hub: what is in its cache is used")
    add("--profile", action="store_true", help="print a table of where the time went")
    return made


if __name__ == "__main__":
    main()
