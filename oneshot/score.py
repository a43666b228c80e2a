"""Score a checkpoint (plus adapter) alone: attack success, over-refusal, look-alike refusal, utility, task.

Run: ``accelerate launch oneshot/score.py --model.path DIR``, DIR being a checkpoint or an adapter on its base.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.settings import Settings

DESCRIPTION = "Measure refusals, over-refusal and utility of a checkpoint or adapter."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot score`` and ``accelerate launch oneshot/score.py``."""
    from oneshot.distributed.stage import run_stage

    run_stage(argv, "oneshot score", DESCRIPTION, run)


def run(settings: Settings) -> None:
    """Score the model (none named: the toy world's aligned one) into a new run folder."""
    from oneshot.checkpoint.adapter import on_device, read_adapter
    from oneshot.checkpoint.load import find_source, load_model, load_tokenizer
    from oneshot.distributed.engine import frozen
    from oneshot.distributed.resources import measured
    from oneshot.distributed.runtime import start
    from oneshot.measure.probes import collect_probes
    from oneshot.measure.rates import score_model
    from oneshot.patch.attach import attached_update
    from oneshot.report.page import write_page
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import build_report, open_run, write_report
    from oneshot.report.table import print_stages
    from oneshot.world.model import toy_settings

    runtime = start()
    model_settings = toy_settings(settings.model)
    source = find_source(model_settings)
    adapter = read_adapter(source.adapter) if source.adapter else None
    tokenizer = load_tokenizer(source, model_settings)
    probes = collect_probes(settings, toy=settings.model.path is None)
    name = settings.model.path or "toy-aligned"
    run_dir = open_run(settings.out, f"{Path(name).name}-score", settings, runtime)
    clock = time.perf_counter()
    update = on_device(adapter.update, runtime.device) if adapter else {}
    with frozen(runtime, load_model(runtime, source, model_settings)) as model, attached_update(model, update):
        stages = {"model": score_model(model, tokenizer, probes, runtime, settings.score)}
    resources = {"seconds": {"score": round(time.perf_counter() - clock, 2)}, **measured(runtime)}
    if (console := open_console(runtime)) is not None:
        report = build_report(
            model=name,
            world_size=runtime.world_size,
            seed=settings.seed,
            example=None,
            stages=stages,
            repair=None,
            resources=resources,
        )
        write_report(run_dir, report)
        write_page(run_dir, report, {stage: scores.answers for stage, scores in stages.items()})
        print_stages(stages, console)
        console.print(f"Report: {run_dir / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()
