"""The ``oneshot`` command: ``oneshot STAGE ...`` runs a stage in this process, or with ``--launch`` in several."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

STAGES = {
    "repair": "repair a fine-tuned model with one safety example (without settings: the toy world)",
    "finetune": "harmful fine-tune, to reproduce and measure the damage",
    "score": "measure refusals, over-refusal and utility of a checkpoint",
    "spectrum": "how few directions hold the safety gradient, and what it stands against",
    "compare": "put finished runs side by side: rates, what differs probe by probe, settings",
    "plan": "what a run takes in memory, disk and minutes, from config.json alone: no GPU, no weights",
    "export": "merge a patch into a checkpoint, take it out again, or make one adapter from others",
}
# command -> its module, its function, and a line about it
COMMANDS = {
    "verify": ("folders", "verify", "check that a checkpoint, adapter or training state is whole"),
    "inspect": ("folders", "inspect", "list a checkpoint's tensors, shards, and which rank of N would own what"),
    "list": ("listing", "main", "what is taken by its name: run settings, attacks, prompt sets, launch files, methods"),
    "init": ("initialize", "main", "copy launch/, ds_configs/ and slurm/ into a folder of yours"),
    "push": ("push", "main", "push a finished repair to the Hub: patch, repaired checkpoint, report"),
    "env": ("environment", "main", "versions and devices, for a bug report"),
}


def main() -> None:
    """Dispatch to a stage; nothing of it is imported before it is named."""
    from oneshot import __version__
    from oneshot.errors import UserError

    arguments = sys.argv[1:]
    if arguments and arguments[0] in STAGES:
        stage, words = arguments[0], arguments[1:]
        try:
            _stage(stage, words)
        except UserError as error:
            _refuse(f"oneshot {stage}", str(error))
    elif arguments and arguments[0] in COMMANDS:
        module, function, _ = COMMANDS[arguments[0]]
        getattr(importlib.import_module(f"oneshot.{module}"), function)(arguments[1:])
    elif arguments in (["--version"], ["-V"]):
        print(f"oneshot {__version__}")
    elif not arguments or arguments[0] in ("--help", "-h"):
        _help()
    else:
        known = ", ".join([*STAGES, *COMMANDS])
        _refuse("oneshot", f"there is no stage {arguments[0]}: take one of {known}.")


def _stage(stage: str, words: list[str]) -> None:
    """Run a stage here, or become the launcher that starts it on several processes."""
    from oneshot import launcher
    from oneshot.commandline import parse
    from oneshot.stages import STAGES as settings_of

    name, options, words = launcher.taken_out(words)
    if name is not None and not {"--help", "-h", "--print_config"} & set(words):
        command = launcher.command(stage, name, options, words)
        if stage in settings_of:  # a mistake is one sentence and exit code 2 here, and a launcher's 1 later
            parse(words, stage)
        launcher.become(command)
    importlib.import_module(f"oneshot.{stage}").main(words)


def _help() -> None:
    print("usage: oneshot STAGE [--config NAME_OR_FILE] [--launch NAME] [--setting value ...]\n")
    for name, text in (STAGES | {name: text for name, (_, _, text) in COMMANDS.items()}).items():
        print(f"  {name:10}{text}")
    print(
        "\noneshot STAGE --help lists a stage's settings. --launch zero3 starts it on several processes, by\n"
        "accelerate with launch/zero3.yaml; accelerate's own options go as --launch.num_processes 4.\n"
        "oneshot list has the names."
    )


def _refuse(prog: str, message: str) -> NoReturn:
    from oneshot.errors import EXIT_USER
    from oneshot.shown import one_line

    print(f"{prog}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(EXIT_USER)
