"""Plan a run before anything is loaded: memory, disk and minutes of every method, from config.json and the settings.

Run: ``oneshot plan --model.path DIR_OR_HUB_ID_OR_config.json --gpus 8 --gpu_memory 80GB``, or with
``--config llama3-70b``. Needs no GPU, no weights and a second, or some at the first sight of a config. Exit code 3: it
does not fit.
"""

from __future__ import annotations

import sys

from oneshot.settings import Settings


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot plan``; its own settings may be given without their section, as ``--gpus 8``."""
    from oneshot.commandline import run_stage

    run_stage(argv, "plan", run)


def run(settings: Settings) -> None:
    """Print the table or JSON; leave with exit code 3 where nothing of what was asked for fits."""
    import json

    from oneshot.planning.check import EXIT_NO_ROOM
    from oneshot.planning.plan import as_json, make_plan
    from oneshot.planning.table import print_plan
    from oneshot.shown import open_console

    plan = make_plan(settings)
    if settings.plan.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print_plan(settings.plan, plan, open_console())
    if not plan.fits:
        sys.exit(EXIT_NO_ROOM)


if __name__ == "__main__":
    main()
