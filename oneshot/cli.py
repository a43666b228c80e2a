"""The ``oneshot`` command: ``oneshot STAGE ...`` runs a stage in this process (accelerate launches the same files)."""

from __future__ import annotations

import importlib
import sys

STAGES = {
    "repair": "repair a fine-tuned model with one safety example (without settings: the toy world, from end to end)",
    "finetune": "harmful fine-tune, to reproduce and measure the damage",
    "score": "measure refusals, over-refusal and utility of a checkpoint",
    "spectrum": "how few directions hold the safety gradient, and what it stands against",
    "compare": "put finished runs side by side: rates, what differs probe by probe, settings",
    "plan": "what a run takes in memory, disk and minutes, from config.json alone: no GPU, no weights",
    "export": "merge a patch into a checkpoint, take it out again, or make one adapter from others",
}
FOLDERS = {
    "verify": "check that a checkpoint, adapter or training state is whole",
    "inspect": "list a checkpoint's tensors, shards, and which rank of N would own what",
}


def main() -> None:
    """Dispatch to a stage; nothing of it is imported before it is named."""
    from oneshot import __version__
    from oneshot.errors import EXIT_USER

    arguments = sys.argv[1:]
    if arguments and arguments[0] in STAGES:
        importlib.import_module(f"oneshot.{arguments[0]}").main(arguments[1:])
    elif arguments and arguments[0] in FOLDERS:
        getattr(importlib.import_module("oneshot.folders"), arguments[0])(arguments[1:])
    elif arguments in (["--version"], ["-V"]):
        print(f"oneshot {__version__}")
    elif not arguments or arguments[0] in ("--help", "-h"):
        print("usage: oneshot STAGE [--config FILE] [--setting value ...]\n")
        for name, text in (STAGES | FOLDERS).items():
            print(f"  {name:10}{text}")
        print("\noneshot STAGE --help lists a stage's settings.")
    else:
        print(
            f"oneshot: error: there is no stage {arguments[0]}: take one of {', '.join(STAGES | FOLDERS)}.",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER)
