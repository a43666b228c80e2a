"""What ranks do for the tests of the spectrum: the stage without its run folder, and the method that uses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from oneshot import spectrum
from oneshot.checkpoint.adapters.update import norm
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.patch import measured
from oneshot.patch.bench import opened
from oneshot.patch.check import check
from oneshot.patch.guard import build_batch
from oneshot.patch.method import finished
from oneshot.patch.path import Attempt
from oneshot.patch.trace import Tracer
from oneshot.settings import DataSettings, ModelSettings, RepairSettings, Settings, SpectrumSettings


def _settings(folder: Path, model: dict[str, Any], measured: dict[str, Any]) -> Settings:
    return Settings(
        model=ModelSettings(**model),
        select="hardest",
        pool=str(folder / "pool.jsonl"),
        guard=str(folder / "guard.jsonl"),
        data=DataSettings(harmful=str(folder / "harmful.jsonl"), harmful_count=5),
        repair=RepairSettings(method="project", rank=4, epochs=8, watch=False, guard_tokens=4),
        spectrum=SpectrumSettings(**{"samples": 5, "batch_size": 2, **measured}),
    )


def measure(runtime: Runtime, folder: str, model: dict[str, Any], asked: dict[str, Any]) -> Any:
    """The spectrum and its sweep, as every rank has them; the error where there is one."""
    settings = _settings(Path(folder), model, asked)
    try:
        found = measured.measure(spectrum.check_fully(settings, runtime))
    except UserError as error:
        return str(error)
    return {"spectrum": dataclasses.asdict(found.spectrum), "sweep": found.sweep, "example": found.example.id}


def project(runtime: Runtime, folder: str, model: dict[str, Any]) -> dict[str, Any]:
    """A projected step: its size, the norm of every matrix's update, and the losses on the way."""
    settings = _settings(Path(folder), model, {})
    request, tracer = check(settings, runtime), Tracer()
    with opened(request) as bench:
        with bench.unpatched() as ready:
            batch = build_batch(
                runtime, ready, request.tokenizer, request.candidates[0], request.guard.all, answer_tokens=4
            )
        path = request.recipe.method.solve(bench, batch, Attempt(tracer, request.recipe.guard_weight))
        update, facts = finished(path)
    probe = {name: float((factors.b @ factors.a).flatten()[:3].sum()) for name, factors in update.items()}
    norms = {name: norm(factors) for name, factors in update.items()}
    return {"facts": facts, "norms": norms, "probe": probe, "trace": tracer.records}
