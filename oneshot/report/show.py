"""The fourth step of a repair: what was measured and done, as a report, cards, tables and words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.loading.reference import why_grown
from oneshot.checkpoint.reads.digests import fingerprint
from oneshot.checkpoint.writing.standing import GOOD, NF4, NF4_DOUBLE
from oneshot.data.conversations import Conversation
from oneshot.data.templates import thinks
from oneshot.measure.further import report_fields
from oneshot.measure.overlap import find_overlaps, overlap_warnings, training_requests
from oneshot.measure.rates import StageScores
from oneshot.patch.choose import Choice
from oneshot.patch.linears import Linears
from oneshot.patch.request import Request
from oneshot.patch.solve import Solution
from oneshot.patch.write import from_degraded, measured_form
from oneshot.report.judging import print_judging
from oneshot.report.modelcard import write_model_cards
from oneshot.report.outputs import write_outputs
from oneshot.report.runfolder import PAGE, PATCH, REPAIRED, Run, build_report, write_selection
from oneshot.report.serving import serve_command
from oneshot.report.summary import outcome_fields
from oneshot.report.table import print_stages
from oneshot.report.times import print_times
from oneshot.report.trackers import track
from oneshot.report.verdict import part_of_measured, unreached
from oneshot.settings import Settings, to_dict

if TYPE_CHECKING:
    from rich.console import Console


_REFUSES_LITTLE = 0.5  # attack success of an aligned model above which its prompts are thought to be the wrong ones


@dataclass(frozen=True)
class Repaired:
    """All that a repair came to, before it is shown.

    Attributes:
        linears: the layers that were eligible
        stages: scores by stage: aligned, finetuned, repaired
        warnings: of the measuring
        resources: seconds (by stage), peak_rss_bytes (by rank) and peak_gpu_bytes, and those of ``where_time_went``
        command: what made it
        coverage: what the patch can reach, as ``Coverage.as_facts``; none of an adapter's repair
    """

    request: Request
    choice: Choice
    solution: Solution
    linears: Linears
    stages: dict[str, StageScores] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    resources: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    coverage: dict[str, Any] | None = None


def show(repaired: Repaired, run_dir: Path, console: Console | None) -> dict[str, Any]:
    """Write the cards, and the report in all its forms, and print the table; return the report. On rank 0.

    The marker of a degraded model, with which patch and checkpoint appeared, is lifted here, by a good verdict alone.

    Args:
        console: none prints nothing
    """
    request, stages, chosen = repaired.request, repaired.stages, repaired.choice.chosen
    settings = request.settings
    taken = request.conversations[chosen.index]
    selection = _named(chosen.selection, request.conversations)
    if selection:
        write_selection(run_dir, selection)
    trained_on = {**training_requests(settings), "the repair example": [taken.prompt[-1]["content"]]}
    overlaps = find_overlaps(request.probes, trained_on)
    warnings = [*_warnings(repaired), *repaired.warnings, *overlap_warnings(overlaps, len(request.probes))]
    report = build_report(
        Run(settings.called, request.runtime.world_size, settings.seed, repaired.command, to_dict(settings)),
        example=_example(taken, repaired.choice, selection),
        stages=stages,
        repair=_facts(repaired),
        resources=repaired.resources,
        warnings=warnings,
    )
    report |= report_fields(settings.score, stages, overlaps, thinks=thinks(request.tokenizer))
    report["fingerprint"] = fingerprint(request.source.checkpoint)
    outcome = outcome_fields(report)
    report = {"schema": report["schema"], "outcome": outcome, **report}
    cards = partial(
        write_model_cards, run_dir, report, base=request.source.name, commit=request.source.commit,
        degraded=from_degraded(request),
        made=[PATCH, *([REPAIRED] if settings.repair.merge else [])], partly=_unmeasured(repaired),
    )  # fmt: skip
    write_outputs(run_dir, report, stages, cards)
    for stage, scores in stages.items():
        track(stage, 0, {name: rate.value for name, rate in scores.rates.items()})
    if console:
        console.print(f"Example: {taken.id} (selected by {chosen.selected_by})", highlight=False)
        print_stages(stages, console)
        print_judging(report, console)
        for warning in warnings:
            console.print(f"Note: {warning}", highlight=False)
        print_times(repaired.resources, console)
        console.print(f"Outcome: {outcome['headline']}.", highlight=False, markup=False)
        console.print(f"Patch: {run_dir / PATCH}\nReport: {run_dir / PAGE}", highlight=False)
        serve = serve_command(run_dir / PATCH, str(run_dir / PATCH))
        if serve and outcome["word"] in GOOD:
            console.print(f"Serve it: {serve}", highlight=False, markup=False, soft_wrap=True)
    return report


def _example(taken: Conversation, choice: Choice, selection: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": taken.id,
        "prompt": taken.prompt[-1]["content"],
        "response": taken.response,
        "selected_by": choice.chosen.selected_by,
        "score": choice.chosen.score,
        **({"selection": selection} if selection else {}),
    }


def _facts(repaired: Repaired) -> dict[str, Any]:
    recipe, solution = repaired.request.recipe, repaired.solution
    return {
        "method": recipe.method.name,
        "reason": recipe.reason,
        "rank": recipe.rank,
        "epochs": recipe.epochs,
        "guard_weight": recipe.guard_weight,
        "guard_prompts": len(repaired.request.guard) if recipe.guard_weight else 0,
        "temperature": recipe.temperature,
        "noise": recipe.noise,
        "stopped_by": solution.stopped_by,
        **solution.facts,
        **({"coverage": repaired.coverage} if repaired.coverage else {}),
        "watch": _watch(solution),
        "bounds": dataclasses.asdict(recipe.bounds) if recipe.bounds else None,
        "trace": solution.trace,
    }


def _watch(solution: Solution) -> dict[str, Any] | None:
    """What the watch saw; none where nothing was to watch."""
    watch, seen = solution.watch, solution.seen
    if watch is None and seen is None:
        return None
    best = watch.best if watch else None
    return {
        "good": best.good(watch.bounds) if watch and best else None,
        "reason": watch.reason() if watch and best else None,
        **(dataclasses.asdict(seen) | {"blind": seen.blind} if seen else {}),
    }


def _unmeasured(repaired: Repaired) -> dict[str, str]:
    """Of patch and merged checkpoint, those that are not what was measured, and why."""
    request, found = repaired.request, {}
    if partly := part_of_measured(repaired.solution.facts):
        found[PATCH] = partly
    form = measured_form(request.source, double_quant=request.settings.model.double_quant)
    if form in (NF4, NF4_DOUBLE):
        found[REPAIRED] = f"the weights were measured in another form ({form}) than they are written in"
    return found


def _named(selection: dict[str, Any], conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The figures of the choice, with the candidates' IDs in place of their numbers."""
    if "table" not in selection:
        return selection
    table = [{"id": conversations[row["candidate"]].id, **row} for row in selection["table"]]
    return {**selection, "table": [{k: v for k, v in row.items() if k != "candidate"} for row in table]}


def _warnings(repaired: Repaired) -> list[str]:
    """What a reader of the figures should know."""
    settings, recipe, facts = repaired.request.settings, repaired.request.recipe, repaired.solution.facts
    source, reference = repaired.request.source, repaired.request.reference
    adapter, said = repaired.request.adapter, list[str]()
    own = adapter.update if adapter is not None else {}  # which may hold factors of routers
    left_out = [name for name in repaired.linears.left_out if name not in own]
    if source.adapter is None and reference is not None and (grown := why_grown(source.checkpoint, reference)):
        said.append(grown)
    aligned = repaired.stages.get("aligned")
    if aligned is not None and (asked := aligned.rates.get("asr")) is not None and asked.value > _REFUSES_LITTLE:
        said.append(
            f"The aligned model itself answers {asked.value:.0%} of the requests that should be refused, so that these "
            "say little of what was brought back: give requests that it refuses, in its language, as --score.probes "
            "and --watch_prompts, and refusals of them as --pool."
        )
    if left_out:
        names, more = ", ".join(left_out[:5]), len(left_out) - 5
        said.append(
            f"{len(left_out)} modules are no plain linear layers that text passes through (routers, convolutions and "
            f"the like) and were left out of the patch: {names}{f' and {more} more' if more > 0 else ''}."
        )
    if facts.get("experts_not_reached"):
        said.append(
            f"No token of the example, the guard or the watch was sent to {facts['experts_not_reached']} of "
            f"{facts['experts']} experts' matrices, which stay as the fine-tune left them: more prompts of your own, "
            "with --guard and --repair.guard_prompts, reach more."
        )
    if said_of_it := unreached(repaired.coverage):
        said.append(said_of_it)
    if settings.guard is None and recipe.guard_weight:
        said.append(
            "The guard held only the shipped harmless prompts: what your fine-tune taught may have been undone with "
            "the damage; give prompts of your own task with --guard."
        )
    if not any(probe.kind == "task" for probe in repaired.request.probes):
        said.append("Your fine-tune's own task was not scored: give prompts with right answers as --score.task.")
    if facts.get("truncation_error", 0) > 0:
        said.append(
            f"The patch holds the rank-{recipe.rank} part of what training changed; it leaves a relative error of "
            f"{facts['truncation_error']:.2f}, and the repaired column is the trained model itself."
        )
    if repaired.solution.seen and repaired.solution.seen.note:
        said.append(repaired.solution.seen.note)
    return said + ([_removal(settings)] if settings.delete_degraded else [])


def _removal(settings: Settings) -> str:
    lost = "" if settings.repair.merge or settings.finetune.method == "lora" else " The patch is for that one."
    return f"The degraded checkpoint is removed once this report is written, as delete_degraded asks.{lost}"
