"""Repairs that go wrong: one that tests kill, and those of a fleet where something fails on rank 0 alone."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from oneshot import fleet
from oneshot.checkpoint.loading import pinned
from oneshot.commandline import parse
from oneshot.distributed import runtime as runtime_module
from oneshot.distributed.runtime import Runtime
from oneshot.errors import DiskFull, UserError
from oneshot.measure.intervals import wilson
from oneshot.measure.rates import StageScores
from oneshot.patch import aligned, bench, teacher, write
from oneshot.patch.select import Chosen
from oneshot.report import members, runfolder, show
from oneshot.settings import Settings

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


def fails_on_rank_0(runtime: Runtime, adapters: str, where: str) -> dict[str, Any]:
    """Run a fleet whose first adapter's repair fails on rank 0 alone; return what this rank saw of it.

    Args:
        where: in the report, or noting an epoch
    """
    runtime_module.start = lambda: runtime  # type: ignore[assignment]  # joined already
    folder, seen, calls = Path(adapters), list[Any](), list[str]()

    def check(settings: Settings, runtime: Runtime) -> Any:
        method = SimpleNamespace(name="rollback", reason="", cost=SimpleNamespace(trains="nothing"))
        tokenizer = SimpleNamespace(get_vocab=dict, chat_template=None)
        return SimpleNamespace(
            settings=settings, runtime=runtime, adapter=object(), recipe=SimpleNamespace(method=method, reason=""),
            tokenizer=tokenizer, source=SimpleNamespace(checkpoint=folder), probes=[],
        )  # fmt: skip

    def patch(request: Any, _teacher: Any, run_dir: Path, shared: Any) -> Any:
        seen.append([Path(request.settings.model.path).name, shared.chosen.selected_by if shared.chosen else None])
        stage.note_epoch(runtime, run_dir, {"epoch": 1})
        return show.Repaired(request, SimpleNamespace(chosen=Chosen(0, "bilevel", 0.5)), None, None)  # type: ignore[arg-type]

    def failing(here: str, done: Any) -> Any:
        def called(*_: Any, **__: Any) -> Any:
            calls.append(here)
            if here == where and calls.count(here) == 1:
                raise DiskFull("The disk is full.")
            return done

        return called

    source = SimpleNamespace(checkpoint=folder)
    given: list[tuple[Any, str, Any]] = [
        (stage, "_patch", patch), (show, "show", failing("report", {})), (pinned, "pinned", lambda one: one),
        (runfolder, "append_event", failing("epoch", None)), (members, "find_source", lambda *_: source),
        (bench, "loaded", lambda _: contextlib.nullcontext(SimpleNamespace(model=None))),
        (teacher, "wanted", lambda _: False), (aligned, "of_reference", lambda _: ({}, None)),
        (aligned, "of_base", lambda *_: {}),
    ]  # fmt: skip
    for module, name, value in given:
        setattr(module, name, value)
    argv = ["--model.paths", f"{adapters}/*", "--out", f"{adapters}-out"]
    ways = fleet.Ways(check, lambda *each: stage._one_of_fleet("", *each))
    problem = ""
    try:
        fleet.run(parse(argv, "repair"), ways, quiet=True)
    except UserError as error:
        problem = str(error)
    rows = json.loads(Path(f"{adapters}-out", "fleet.json").read_text())["rows"]
    return {"seen": seen, "problem": problem, "rows": [row["problem"] for row in rows]}
