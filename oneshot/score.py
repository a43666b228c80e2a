"""Score a checkpoint (plus adapter) or a served model alone: attack success, over-refusal, utility, task.

Run: ``accelerate launch oneshot/score.py --model.path DIR``, DIR being a checkpoint or an adapter on its base; or
``oneshot score --score.endpoint.url URL`` for a model behind an OpenAI-compatible server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.settings import Settings

if TYPE_CHECKING:
    from oneshot.checkpoint.adapter import Update
    from oneshot.distributed.runtime import Runtime
    from oneshot.measure.intervals import Rate
    from oneshot.measure.overlap import Overlap
    from oneshot.measure.rates import Probe, StageScores

DESCRIPTION = "Measure refusals, over-refusal and utility of a checkpoint, an adapter or a served model."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot score`` and ``accelerate launch oneshot/score.py``."""
    from oneshot.distributed.stage import run_stage

    run_stage(argv, "oneshot score", DESCRIPTION, run)


def run(settings: Settings) -> None:
    """Score the model (none named: the toy world's aligned one) into a new run folder, or go on in an old one."""
    from oneshot.distributed.resources import measured
    from oneshot.distributed.runtime import agree, start
    from oneshot.errors import UserError
    from oneshot.measure.further import ask_judges, check_judges
    from oneshot.measure.harness import check_tasks
    from oneshot.measure.overlap import find_overlaps, overlap_warnings, training_requests
    from oneshot.measure.probes import collect_probes

    runtime = start()
    served = settings.score.endpoint.url is not None
    if served and runtime.world_size > 1:
        raise UserError("A server is asked by one process: start oneshot score without a launcher.")
    if served and settings.score.text is not None:
        raise UserError("Setting score.text needs the model's weights, which a server does not give: leave it out.")
    probes = collect_probes(settings, toy=settings.model.path is None and not served)
    check_tasks(settings.score, runtime)
    check_judges(runtime, settings.score)
    overlaps: list[Overlap] = []
    with agree(runtime, "reading the training data"):
        if runtime.is_main:
            overlaps = find_overlaps(probes, training_requests(settings))
    clock = time.perf_counter()
    scored = (_score_served if served else _score_local)(runtime, settings, probes)
    stages, warnings = ask_judges(runtime, scored.run_dir, settings.score, scored.probes, {"model": scored.scores})
    resources = {"seconds": {"score": round(time.perf_counter() - clock, 2)}, **measured(runtime)}
    warnings = [*scored.warnings, *warnings, *overlap_warnings(overlaps, len(probes))]
    _show(runtime, settings, scored, stages, resources, overlaps, warnings)


@dataclass(frozen=True)
class _Scored:
    """What was scored: what it is called, where the answers are, those of which probes, and what is to be said."""

    name: str
    run_dir: Path
    probes: list[Probe]
    scores: StageScores
    warnings: list[str]


def _score_served(runtime: Runtime, settings: Settings, probes: list[Probe]) -> _Scored:
    from oneshot.errors import UserError
    from oneshot.measure.endpoint import open_endpoint
    from oneshot.measure.harness import run_on_endpoint
    from oneshot.measure.rates import score_answers
    from oneshot.measure.target import ask_missing, collect_answers, endpoint_target

    score = settings.score
    endpoint = open_endpoint(score.endpoint, "score.endpoint")
    run_dir = _open(runtime, settings, f"{Path(endpoint.model).name}-score")
    asked = ask_missing(endpoint, run_dir, score)
    answers = collect_answers(runtime, run_dir, endpoint_target(endpoint), probes, score.max_new_tokens, asked)
    answered = [(probe, answer) for probe, answer in zip(probes, answers) if answer is not None]
    left_out, warnings = len(probes) - len(answered), []
    if not answered:
        raise UserError(f"{endpoint.url} rejected all {len(probes)} prompts: there is nothing to score.")
    if left_out:
        warnings.append(
            f"The server rejected {left_out} of {len(probes)} prompts, too long for it or stopped by a filter of its "
            "own: they are left out of the figures."
        )
    kept = [probe for probe, _ in answered]
    scores = score_answers(kept, [answer for _, answer in answered], rouge=score.rouge)
    figures = run_on_endpoint(endpoint, score) if score.lm_eval is not None else {}
    name = f"{endpoint.model} at {endpoint.url}"
    return _Scored(name, run_dir, kept, _with_figures(scores, figures), warnings)


def _score_local(runtime: Runtime, settings: Settings, probes: list[Probe]) -> _Scored:
    """Load the model, unless all that is wanted is known, and let it answer. Collective."""
    from oneshot.checkpoint.adapter import on_device, read_adapter
    from oneshot.checkpoint.files import is_degraded
    from oneshot.checkpoint.load import find_source, load_model, load_tokenizer
    from oneshot.distributed.engine import frozen
    from oneshot.measure.rates import score_answers
    from oneshot.measure.target import checkpoint_target, collect_answers, generate_missing
    from oneshot.measure.text import read_texts
    from oneshot.patch.attach import attached_update
    from oneshot.world.model import toy_settings

    score = settings.score
    model_settings = toy_settings(settings.model)
    source = find_source(model_settings)
    adapter = read_adapter(source.adapter) if source.adapter else None
    tokenizer = load_tokenizer(source, model_settings)
    texts = read_texts(score.text) if score.text is not None else []
    name = settings.model.path or "toy-aligned"
    run_dir = _open(runtime, settings, f"{Path(name).name}-score")
    with contextlib.ExitStack() as loaded:
        update: Update = {}
        models: list[Any] = []

        def model() -> Any:
            if not models:
                models.append(loaded.enter_context(frozen(runtime, load_model(runtime, source, model_settings))))
                update.update(on_device(adapter.update, runtime.device) if adapter else {})
                loaded.enter_context(attached_update(models[0], update))
            return models[0]

        answers = collect_answers(
            runtime,
            run_dir,
            checkpoint_target(source),
            probes,
            score.max_new_tokens,
            lambda prompts, finish: generate_missing(model(), tokenizer, runtime, score)(prompts, finish),
        )
        # a model in this process leaves no prompt out
        scores = score_answers(probes, [answer or "" for answer in answers], rouge=score.rouge)
        if texts or score.lm_eval is not None:
            scores = _with_figures(scores, _on_weights(runtime, settings, model(), tokenizer, update, texts))
    warnings = []
    if is_degraded(source.adapter or source.checkpoint):
        warnings.append("This model is marked as made unsafe by a harmful fine-tune: do not publish or serve it.")
    return _Scored(name, run_dir, probes, scores, warnings)


def _on_weights(
    runtime: Runtime, settings: Settings, model: Any, tokenizer: Any, update: Update, texts: list[str]
) -> dict[str, Rate]:
    """What takes the model itself: text figures and lm-eval's tasks. Collective."""
    from oneshot.data.encoding import context_length
    from oneshot.measure.harness import run_on_model
    from oneshot.measure.text import measure_text

    @contextlib.contextmanager
    def without_adapter() -> Iterator[None]:
        kept = dict(update)
        update.clear()  # the hooks look it up at each pass
        try:
            yield
        finally:
            update.update(kept)

    found: dict[str, Rate] = {}
    if texts:
        limit = context_length(model.config, tokenizer, settings.model.max_length)
        found |= measure_text(runtime, model, tokenizer, texts, limit, without_adapter if update else None)
    if settings.score.lm_eval is not None:
        found |= run_on_model(model, tokenizer, settings.score)
    return found


def _with_figures(scores: StageScores, figures: dict[str, Rate]) -> StageScores:
    """The scores with further figures: lm-eval's shares among the rates, the others apart."""
    shares = {name: rate for name, rate in figures.items() if name.endswith("(lm-eval)") and 0 <= rate.value <= 1}
    others = {name: rate for name, rate in figures.items() if name not in shares}
    return dataclasses.replace(scores, rates=scores.rates | shares, others=scores.others | others)


def _open(runtime: Runtime, settings: Settings, name: str) -> Path:
    """The run folder; with --resume one that has answers, whatever was scored there, is gone on in. Collective."""
    from oneshot import settings as settings_module
    from oneshot.distributed.runtime import agree
    from oneshot.errors import UserError
    from oneshot.measure.cache import RESPONSES
    from oneshot.report.runfolder import REPORT, SETTINGS, open_run

    if settings.resume and settings.out is not None:
        out = Path(settings.out)
        with agree(runtime, f"going on in {out}"):
            if runtime.is_main and (out / RESPONSES).is_file() and (out / SETTINGS).is_file():
                if (out / REPORT).is_file() and json.loads((out / REPORT).read_text(encoding="utf-8")).get("repair"):
                    raise UserError(f"{out} holds a repair, not a scoring: give another --out.")
                (out / REPORT).unlink(missing_ok=True)  # made anew from the answers beside it
                settings_module.write(settings, out / SETTINGS)
    return open_run(settings.out, name, settings, runtime)


def _show(
    runtime: Runtime,
    settings: Settings,
    scored: _Scored,
    stages: dict[str, StageScores],
    resources: dict[str, Any],
    overlaps: list[Overlap],
    warnings: list[str],
) -> None:
    """Print the table; write the report in all its forms."""
    from oneshot.measure.further import report_fields
    from oneshot.report.outputs import write_outputs
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import RunFacts, build_report
    from oneshot.report.table import print_stages

    if (console := open_console(runtime)) is None:
        return
    report = build_report(
        RunFacts(scored.name, runtime.world_size, settings.seed),
        example=None,
        stages=stages,
        repair=None,
        resources=resources,
        warnings=warnings,
    )
    write_outputs(scored.run_dir, report | report_fields(stages, overlaps), stages)
    print_stages({s: dataclasses.replace(f, rates=f.rates | f.others) for s, f in stages.items()}, console)
    for warning in warnings:
        console.print(f"Note: {warning}", highlight=False, markup=False)
    console.print(f"Report: {scored.run_dir / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()
