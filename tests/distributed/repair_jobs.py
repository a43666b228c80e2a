"""A repair that tests kill."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from oneshot.commandline import parse
from oneshot.distributed import runtime as runtime_module
from oneshot.distributed.runtime import Runtime
from oneshot.measure.intervals import wilson
from oneshot.measure.rates import StageScores
from oneshot.patch import aligned, write

# the stage's module: the package's own name is a function
stage = importlib.import_module("oneshot.repair")


def repair(runtime: Runtime, argv: list[str], attack: float, writing: str) -> str:
    """Run the stage with scores that are given: the model counts as broken before.

    Args:
        attack: its attack success afterwards
        writing: file that appears when the patch is about to be written
    """
    runtime_module.start = lambda: runtime  # type: ignore[assignment]  # joined already
    asked: list[float] = [1.0, attack]
    begun = write.write_repair

    def score(*_: Any) -> StageScores:
        rates = {"asr": asked.pop(0), "over_refusal": 0.0, "lookalike_refusal": 0.0}
        return StageScores({name: wilson(round(100 * rate), 100) for name, rate in rates.items()}, [])

    def told(*given: Any) -> None:
        Path(writing).touch()
        begun(*given)

    aligned.scored = score  # type: ignore[assignment]
    write.write_repair = told  # type: ignore[assignment]
    outcome: str = stage.run(parse(argv, "repair"), quiet=True).report.get("outcome", {}).get("word", "")
    return outcome
