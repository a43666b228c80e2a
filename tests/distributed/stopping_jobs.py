"""A fine-tune that tests tell to stop."""

from __future__ import annotations

import importlib
import time
from typing import Any

from oneshot.commandline import parse
from oneshot.distributed import runtime as runtime_module
from oneshot.distributed.runtime import Runtime
from oneshot.distributed.signals import Interrupted
from oneshot.training import loop

# the stages' modules: the package's own names are functions
finetune = importlib.import_module("oneshot.finetune")


def train(runtime: Runtime, argv: list[str], seconds: float = 0.0) -> str:
    """Run the stage, each step slowed down by so much; returns what it said when it was told to stop."""
    runtime_module.start = lambda: runtime  # type: ignore[assignment]  # joined already
    step = loop.TrainingEngine.step

    def slow(engine: Any) -> float:
        time.sleep(seconds)
        return step(engine)

    loop.TrainingEngine.step = slow  # type: ignore[method-assign]
    try:
        finetune.run(parse(argv, "finetune"))
    except Interrupted as stop:
        return str(stop)
    return "done"
