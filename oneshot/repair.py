"""One-shot repair: patch a fine-tuned model with one safety example and show that nothing else moved.

Run: ``accelerate launch oneshot/repair.py`` (the toy world, from aligned model to repaired one), or
``accelerate launch --config_file launch/zero3.yaml oneshot/repair.py --model.path DIR --reference DIR --guard FILE``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.distributed.runtime import Runtime
    from oneshot.measure.rates import StageScores
    from oneshot.patch.job import Job, Outcome
    from oneshot.patch.recipe import Recipe

DESCRIPTION = "Repair the safety of a fine-tuned model with one safety example."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot repair`` and ``accelerate launch oneshot/repair.py``."""
    from oneshot.distributed.stage import run_stage

    run_stage(argv, "oneshot repair", DESCRIPTION, run)


def run(settings: Settings) -> None:
    """Repair the user's model, or run the whole chain on the toy world where none is named."""
    from oneshot.checkpoint.files import stored_bytes
    from oneshot.checkpoint.quarantine import check_own, remove_degraded
    from oneshot.distributed.runtime import agree, start
    from oneshot.errors import UserError
    from oneshot.finetune import FINETUNED, STATE, finetune, prepare, writes
    from oneshot.report.preflight import look_around
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import SETTINGS, open_run
    from oneshot.report.trackers import check_installed, start_tracking
    from oneshot.world.model import ALIGNED

    runtime = start()
    check_installed(settings.log_with)
    console = open_console(runtime)
    seconds: dict[str, float] = {}
    toy = settings.model.path is None
    if settings.delete_degraded and not toy:
        raise UserError(
            "Setting delete_degraded removes only what this run itself fine-tuned, never a model that is given as "
            "--model.path: leave it out, and remove that model yourself."
        )
    if toy:
        trained = _unquantized(settings) if settings.finetune.method == "full" else settings
        prepared = prepare(trained)
        plan(runtime, on_toy(settings, ALIGNED), toy=True)  # a bad setting or file is to be heard before the minute
        with agree(runtime, "looking for what must not be removed"):
            begun = settings.resume and settings.out is not None and (Path(settings.out) / SETTINGS).is_file()
            if settings.delete_degraded and settings.out is not None and not begun:
                check_own(Path(settings.out), [FINETUNED, STATE])
        run_dir = open_run(settings.out, "toy", settings, runtime)
        start_tracking(runtime, settings.log_with, run_dir)
        look_around(runtime, settings.preflight, run_dir, writes(trained, prepared), console)
        clock = time.perf_counter()
        degraded = run_dir / FINETUNED
        if not degraded.exists():  # else an interrupted run had come further
            finetune(runtime, trained, prepared, run_dir, console)
        seconds["finetune"] = time.perf_counter() - clock
        settings = on_toy(settings, degraded)
        planned = plan(runtime, settings, toy=True)
    else:
        planned = plan(runtime, settings, toy=False)
        run_dir = open_run(settings.out, str(settings.model.path), settings, runtime)
        start_tracking(runtime, settings.log_with, run_dir)
        merged = stored_bytes(planned[0].source.checkpoint) if settings.repair.merge else 0
        look_around(runtime, settings.preflight, run_dir, merged, console)
    repair_model(runtime, settings, planned, run_dir, console, seconds)
    if settings.delete_degraded:
        with agree(runtime, "removing the degraded checkpoint"):
            for folder in remove_degraded(run_dir, FINETUNED, STATE) if runtime.is_main else []:
                print(f"Removed, as asked: {folder}", flush=True)


def repair_model(
    runtime: Runtime,
    settings: Settings,
    planned: tuple[Job, Recipe, Stages],
    run_dir: Path,
    console: Console | None,
    seconds: dict[str, float],
) -> Stages:
    """Repair what was planned, write the run folder's outputs and print the table. Collective.

    Args:
        console: of rank 0; none on the others
        seconds: by stage, of what went before; added to
    """
    from oneshot.measure.further import ask_judges

    job, recipe, stages = planned
    if console:
        console.print(f"Method: {recipe.method} ({recipe.reason})", highlight=False)
    outcome = _repair(runtime, settings, job, recipe, stages, run_dir, console, seconds)
    stages.scores, stages.warnings = ask_judges(runtime, run_dir, settings.score, stages.probes, stages.scores)
    if console:
        _show(settings, run_dir, job, recipe, outcome, stages, console)
    return stages


def _unquantized(settings: Settings) -> Settings:
    """The settings for a stage that trains the weights, which can only be quantized afterwards."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, quantize=None))


def on_toy(settings: Settings, model: Path) -> Settings:
    """Return the settings with a fine-tuned toy model and the aligned one that it came from."""
    from oneshot.world.model import ALIGNED

    named = dataclasses.replace(settings.model, path=str(model), base=str(ALIGNED))
    return dataclasses.replace(settings, model=named, reference=settings.reference or str(ALIGNED))


class Stages:
    """The stages measured so far, with the means to measure one more."""

    def __init__(self, runtime: Runtime, settings: Settings, tokenizer: Any, *, toy: bool) -> None:
        from oneshot.measure.probes import collect_probes

        self.runtime, self.settings, self.tokenizer, self.toy = runtime, settings, tokenizer, toy
        self.probes = collect_probes(settings, toy=toy)
        self.scores: dict[str, StageScores] = {}
        self.warnings: list[str] = []
        self.conversations: list[Any] = []
        self.resources: dict[str, Any] = {}

    def measure(self, model: Any, stage: str) -> StageScores:
        from oneshot.measure.rates import score_model

        self.scores[stage] = score_model(model, self.tokenizer, self.probes, self.runtime, self.settings.score)
        return self.scores[stage]


def plan(runtime: Runtime, settings: Settings, *, toy: bool) -> tuple[Job, Recipe, Stages]:
    """Read and check everything that can be wrong before a model is loaded or a file is written."""
    from transformers import AutoConfig

    from oneshot.checkpoint.adapter import read_adapter
    from oneshot.checkpoint.files import resolve
    from oneshot.checkpoint.load import check_reference, find_source, load_tokenizer
    from oneshot.data.encoding import context_length, encode
    from oneshot.errors import UserError
    from oneshot.measure.further import check_judges
    from oneshot.patch.examples import check_apart, read_candidates, read_guard, read_held, read_refusable
    from oneshot.patch.job import Job
    from oneshot.patch.objective import check_same_tokens
    from oneshot.patch.recipe import recipe_for
    from oneshot.patch.trace import Tracer
    from oneshot.planning.check import refuse_what_cannot_fit

    source = find_source(settings.model)
    adapter = read_adapter(source.adapter) if source.adapter else None
    reference = resolve(settings.reference, "reference") if settings.reference else None
    if reference is not None and adapter is None:
        check_reference(source.checkpoint, reference)
    tokenizer = load_tokenizer(source, settings.model)
    config = AutoConfig.from_pretrained(source.checkpoint, trust_remote_code=settings.model.trust_remote_code)
    limit = context_length(config, tokenizer, settings.model.max_length)
    check_judges(runtime, settings.score)
    stages = Stages(runtime, settings, tokenizer, toy=toy)
    stages.conversations = read_candidates(settings, toy=toy)
    check_apart(stages.conversations, stages.probes)
    has_update = adapter is not None or reference is not None
    recipe = recipe_for(settings, has_update=has_update, toy=toy, four_bit=source.four_bit)
    if source.four_bit and recipe.method == "sft":
        raise UserError("Method sft trains all weights, which 4 bits do not allow: use rollback, lowrank or lora.")
    refuse_what_cannot_fit(settings, runtime, source.checkpoint, recipe.method)
    wants_guard = recipe.guard_weight or (settings.select == "bilevel" and len(stages.conversations) > 1)
    guard = read_guard(settings, recipe.guard_prompts, toy=toy) if wants_guard else []
    job = Job(
        runtime=runtime,
        source=source,
        model_settings=settings.model,
        tokenizer=tokenizer,
        adapter=adapter,
        reference=reference,
        candidates=[encode(conversation, tokenizer, limit) for conversation in stages.conversations],
        prompts=[conversation.prompt for conversation in stages.conversations],
        rule=settings.select,
        shortlist=settings.shortlist,
        seed=settings.seed,
        guard=guard,
        refusable=read_refusable(settings, toy=toy) if recipe.bounds else [],
        held=read_held(settings, guard, toy=toy) if recipe.bounds else [],
        tracer=Tracer(),
    )
    if reference is not None and adapter is None:
        check_same_tokens(job.candidates, tokenizer, reference)
    return job, recipe, stages


def _repair(
    runtime: Runtime,
    settings: Settings,
    job: Job,
    recipe: Recipe,
    stages: Stages,
    run_dir: Path,
    console: Console | None,
    seconds: dict[str, float],
) -> Outcome:
    """Measure the reference, repair, and write the outputs. Collective."""
    from oneshot.checkpoint.load import Source, load_model
    from oneshot.distributed.engine import frozen
    from oneshot.distributed.resources import measured
    from oneshot.patch.methods import repair
    from oneshot.patch.prepare import asks_gradients, know_aligned
    from oneshot.patch.trace import Tracer
    from oneshot.report.progress import progress
    from oneshot.report.runfolder import append_event
    from oneshot.report.trackers import track

    clock = time.perf_counter()
    unknown = job.adapter is None and job.reference is not None and asks_gradients(job) and not know_aligned(job)
    if job.reference is not None and (settings.score.reference or unknown):
        aligned = Source(job.reference, None, job.reference, str(job.reference), job.source.dtype)
        with frozen(runtime, load_model(runtime, aligned, job.model_settings)) as model:
            if settings.score.reference:
                stages.measure(model, "aligned")
            if unknown:
                know_aligned(job, model)
        del model
        seconds["aligned"] = time.perf_counter() - clock
    clock = time.perf_counter()
    with progress(console, "repair", recipe.epochs) as tell:

        def listen(record: dict[str, Any]) -> None:
            if runtime.is_main:
                append_event(run_dir, stage="repair", **record)
                track("repair", record["epoch"], record)
                tell(record["epoch"], f"loss {record['loss']:.4f}")

        job.tracer = Tracer(listen)
        outcome = repair(
            job,
            recipe,
            stages.measure,
            lambda model, update, linears: _write(runtime, settings, job, recipe, run_dir, model, update, linears),
        )
    seconds["repair"] = time.perf_counter() - clock
    stages.resources = {"seconds": {k: round(v, 2) for k, v in seconds.items()}, **measured(runtime)}
    return outcome


def _write(
    runtime: Runtime, settings: Settings, job: Job, recipe: Recipe, run_dir: Path, model: Any, update: Any, linears: Any
) -> None:
    """Write the patch, and the merged checkpoint if asked for. Collective."""
    from oneshot.checkpoint.adapter import write_patch, write_repaired_adapter
    from oneshot.checkpoint.identity import REPAIR, write_identity
    from oneshot.checkpoint.merge import merge_update
    from oneshot.checkpoint.save import save_checkpoint
    from oneshot.distributed.runtime import agree

    folder = run_dir / "patch"
    with agree(runtime, f"writing the patch {folder}"):
        if runtime.is_main:
            if job.adapter is not None and recipe.method == "rollback":
                write_repaired_adapter(folder, job.adapter, update)
            else:
                write_patch(folder, update, linears.every, job.source.name, job.source.dtype)
            job.tokenizer.save_pretrained(folder)
            write_identity(folder, job.source.checkpoint, kind=REPAIR, base=job.source.name)
    if not settings.repair.merge:
        return
    target = run_dir / "repaired"
    if recipe.method == "sft":
        save_checkpoint(runtime, model, job.tokenizer, target, job.source.dtype, stock=settings.model.stock_io)
    else:  # from the files: the weights in memory may be partitioned, or in 4 bits
        merge_update(runtime, job.source.checkpoint, update, target, trust_remote_code=settings.model.trust_remote_code)


def _show(
    settings: Settings, run_dir: Path, job: Job, recipe: Recipe, outcome: Outcome, stages: Stages, console: Console
) -> None:
    """Print the table; write the cards, and the report in all its forms."""
    from oneshot.checkpoint.files import is_degraded
    from oneshot.measure.further import report_fields
    from oneshot.measure.overlap import find_overlaps, overlap_warnings, training_requests
    from oneshot.report.modelcard import write_model_cards
    from oneshot.report.outputs import write_outputs
    from oneshot.report.runfolder import RunFacts, build_report, write_selection
    from oneshot.report.summary import LIMITS, summarize
    from oneshot.report.table import print_stages
    from oneshot.report.trackers import track

    taken = stages.conversations[outcome.chosen.index]
    selection = _named(outcome.chosen.selection, stages.conversations)
    if selection:
        write_selection(run_dir, selection)
    console.print(f"Example: {taken.id} (selected by {outcome.chosen.selected_by})", highlight=False)
    trained_on = {**training_requests(settings), "the repair example": [taken.prompt[-1]["content"]]}
    overlaps = find_overlaps(stages.probes, trained_on)
    warnings = _warnings(settings, recipe, outcome, toy=stages.toy) + stages.warnings
    warnings += overlap_warnings(overlaps, len(stages.probes))
    report = build_report(
        RunFacts("toy world" if stages.toy else str(settings.model.path), job.runtime.world_size, settings.seed),
        example={
            "id": taken.id,
            "prompt": taken.prompt[-1]["content"],
            "response": taken.response,
            "selected_by": outcome.chosen.selected_by,
            "score": outcome.chosen.score,
            **({"selection": selection} if selection else {}),
        },
        stages=stages.scores,
        repair={
            "method": recipe.method,
            "reason": recipe.reason,
            "rank": recipe.rank,
            "epochs": recipe.epochs,
            "guard_weight": recipe.guard_weight,
            "guard_prompts": len(job.guard) if recipe.guard_weight else 0,
            "temperature": recipe.temperature,
            "noise": recipe.noise,
            "stopped_by": outcome.stopped_by,
            **outcome.facts,
            "bounds": dataclasses.asdict(recipe.bounds) if recipe.bounds else None,
            "trace": job.tracer.records,
        },
        resources=stages.resources,
        warnings=warnings,
    )
    given = [folder for folder in (job.source.checkpoint, job.source.adapter) if folder is not None]
    write_model_cards(run_dir, report, base=job.source.name, degraded=any(map(is_degraded, given)))
    report |= report_fields(stages.scores, overlaps)
    write_outputs(run_dir, report, stages.scores)
    for stage, scores in stages.scores.items():
        track(stage, 0, {name: rate.value for name, rate in scores.rates.items()})
    print_stages(stages.scores, console)
    for warning in warnings:
        console.print(f"Note: {warning}", highlight=False)
    console.print(f"Outcome: {summarize(report).word}. {LIMITS}", highlight=False)
    console.print(f"Patch: {run_dir / 'patch'}\nReport: {run_dir / 'report.html'}", highlight=False)


def _named(selection: dict[str, Any], conversations: list[Any]) -> dict[str, Any]:
    """The figures of the choice, with the candidates' IDs in place of their numbers."""
    if "table" not in selection:
        return selection
    table = [{"id": conversations[row["candidate"]].id, **row} for row in selection["table"]]
    return {**selection, "table": [{k: v for k, v in row.items() if k != "candidate"} for row in table]}


def _warnings(settings: Settings, recipe: Recipe, outcome: Outcome, *, toy: bool) -> list[str]:
    """What a reader of the figures should know."""
    said = []
    if outcome.linears.left_out:
        names = ", ".join(outcome.linears.left_out[:5])
        more = len(outcome.linears.left_out) - 5
        said.append(
            f"{len(outcome.linears.left_out)} modules hold weights that are no plain linear layers and were left "
            f"out of the patch: {names}{f' and {more} more' if more > 0 else ''}."
        )
    if not toy and settings.guard is None and recipe.guard_weight:
        said.append(
            "The guard held only the shipped harmless prompts: what your fine-tune taught may have been undone with "
            "the damage; give prompts of your own task with --guard."
        )
    if not toy and settings.score.task is None:
        said.append("Your fine-tune's own task was not scored: give prompts with right answers as --score.task.")
    if outcome.facts.get("truncation_error", 0) > 0:
        said.append(
            f"The patch holds the rank-{recipe.rank} part of what training changed; it leaves a relative error of "
            f"{outcome.facts['truncation_error']:.2f}, and the repaired column is the trained model itself."
        )
    if settings.delete_degraded:
        lost = "" if settings.repair.merge or settings.finetune.method == "lora" else " The patch is for that one."
        said.append(f"The degraded checkpoint is removed once this report is written, as delete_degraded asks.{lost}")
    return said


if __name__ == "__main__":
    main()
