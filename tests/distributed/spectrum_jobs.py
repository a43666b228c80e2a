"""What ranks do for the tests of the spectrum: the stage without its run folder, and the method that uses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from oneshot import repair, spectrum
from oneshot.checkpoint.load import load_model
from oneshot.checkpoint.update import norm
from oneshot.distributed.engine import frozen
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears
from oneshot.patch.solvers import Solver
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


def measure(runtime: Runtime, folder: str, model: dict[str, Any], measured: dict[str, Any]) -> Any:
    """The spectrum and its sweep, as every rank has them; the error where there is one."""
    settings = _settings(Path(folder), model, measured)
    try:
        found, sweep, example = spectrum.measure(runtime, settings, spectrum.plan(runtime, settings, toy=False))
    except UserError as error:
        return str(error)
    return {"spectrum": dataclasses.asdict(found), "sweep": sweep, "example": example.id}


def project(runtime: Runtime, folder: str, model: dict[str, Any]) -> dict[str, Any]:
    """A projected step: its size, the norm of every matrix's update, and the losses on the way."""
    settings = _settings(Path(folder), model, {})
    job, recipe, _ = repair.plan(runtime, settings, toy=False)
    loaded = load_model(runtime, job.source, job.model_settings)
    linears = select_linears(loaded)
    with frozen(runtime, loaded) as ready:
        solver = Solver(job, recipe, ready, linears)
        batch = repair_batch(job, ready)
        update = solver.solve(batch, job.tracer, recipe.guard_weight)
    probe = {name: float((factors.b @ factors.a).flatten()[:3].sum()) for name, factors in update.items()}
    norms = {name: norm(factors) for name, factors in update.items()}
    return {"facts": solver.facts, "norms": norms, "probe": probe, "trace": job.tracer.records}


def repair_batch(job: Any, model: Any) -> Any:
    """The batch of the first candidate."""
    from oneshot.patch.attach import attached_update
    from oneshot.patch.guard import build_batch
    from oneshot.patch.job import own_update

    with attached_update(model, own_update(job)):
        return build_batch(job.runtime, model, job.tokenizer, job.candidates[0], job.guard, answer_tokens=4)
