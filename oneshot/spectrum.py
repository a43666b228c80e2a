"""Spectrum of the safety gradient: how few directions hold it, who shares them, and what it stands against.

Run: ``accelerate launch oneshot/spectrum.py`` (the toy world: its aligned model is fine-tuned first), or
``accelerate launch --config_file launch/zero3.yaml oneshot/spectrum.py --model.path DIR --data.harmful FILE``.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # or our folder names would shadow top-level modules

from oneshot.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from oneshot.data.conversations import Conversation
    from oneshot.data.encoding import Encoded
    from oneshot.distributed.runtime import Runtime
    from oneshot.patch.job import Job
    from oneshot.patch.recipe import Recipe
    from oneshot.patch.spectrum import Spectrum

DESCRIPTION = "Measure the spectrum of the safety gradient, from factors."
SWEPT = (1, 2, 4, 8, 20)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot spectrum`` and ``accelerate launch oneshot/spectrum.py``."""
    from oneshot.commandline import run_stage

    run_stage(argv, "spectrum", run)


def run(settings: Settings) -> None:
    """Measure the user's model, or the toy world's, fine-tuned first, into a new run folder."""
    from oneshot.distributed.runtime import start
    from oneshot.errors import UserError
    from oneshot.report.progress import open_console
    from oneshot.report.runfolder import open_run

    if settings.delete_degraded:
        raise UserError("Setting delete_degraded belongs to repair, which measures the model first: leave it out.")
    runtime = start()
    console = open_console(runtime)
    toy = settings.model.path is None
    if toy:
        settings, run_dir = _toy_model(runtime, settings, console)
    planned = plan(runtime, settings, toy=toy)
    if not toy:
        run_dir = open_run(settings.out, f"{Path(str(settings.model.path)).name}-spectrum", settings, runtime)
    clock = time.perf_counter()
    found, sweep, example = measure(runtime, settings, planned)
    if console:
        _show(settings, run_dir, planned, found, sweep, example, time.perf_counter() - clock, console)


def _toy_model(runtime: Runtime, settings: Settings, console: Console | None) -> tuple[Settings, Path]:
    """Fine-tune the toy's aligned model into a new run folder; return the settings with it as the model."""
    from oneshot.finetune import FINETUNED, finetune, prepare
    from oneshot.repair import on_toy
    from oneshot.report.runfolder import open_run
    from oneshot.world.model import ALIGNED

    plain = dataclasses.replace(settings, model=dataclasses.replace(settings.model, quantize=None))
    trained = plain if settings.finetune.method == "full" else settings  # only an adapter is trained on 4-bit weights
    prepared = prepare(trained)
    plan(runtime, on_toy(settings, ALIGNED), toy=True)  # a bad setting or file is to be heard before the minute
    run_dir = open_run(settings.out, "toy-spectrum", settings, runtime)
    if not (run_dir / FINETUNED).exists():  # else an interrupted run had come further
        finetune(runtime, trained, prepared, run_dir, console)
    return on_toy(settings, run_dir / FINETUNED), run_dir


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is measured on, read and checked.

    Attributes:
        pool: the safety examples, the measured one is among them or beside them
        others: harmful and task conversations, by group
        notes: what a reader should know
    """

    job: Job
    recipe: Recipe
    candidates: list[Conversation]
    pool: list[Conversation]
    others: dict[str, list[Conversation]]
    length: int
    notes: list[str]


def plan(runtime: Runtime, settings: Settings, *, toy: bool) -> Planned:
    """Read and check everything that can be wrong before a model is loaded or a file is written."""
    from transformers import AutoConfig

    from oneshot import repair
    from oneshot.data.encoding import context_length
    from oneshot.patch.examples import read_candidates
    from oneshot.training.mixture import attack_mixture, parts_of

    options = dataclasses.replace(settings.repair, method="project", guard_weight=1.0, watch=False)
    job, recipe, stages = repair.plan(runtime, dataclasses.replace(settings, repair=options), toy=toy)
    config = AutoConfig.from_pretrained(job.source.checkpoint, trust_remote_code=settings.model.trust_remote_code)
    length = context_length(config, job.tokenizer, settings.model.max_length)
    pool = read_candidates(dataclasses.replace(settings, example=None, select="hardest"), toy=toy)
    parts = parts_of(settings.data, toy=toy)
    mixed = attack_mixture(settings, toy=toy) if any(part.count != 0 for part in parts.values()) else []
    others = {
        kind: _some([row for row in mixed if row.kind == kind], settings.spectrum.samples, settings.seed)
        for kind in ("harmful", "task")
    }
    notes = []
    if not others["harmful"]:
        notes.append("No harmful conversations were compared: give those of your fine-tune with --data.harmful.")
    return Planned(job, recipe, stages.conversations, pool, others, length, notes)


def _some(rows: list[Any], count: int, seed: int) -> list[Any]:
    """At most ``count`` of the rows, drawn with the seed."""
    return random.Random(f"spectrum-{seed}").sample(rows, min(count, len(rows)))


def measure(
    runtime: Runtime, settings: Settings, planned: Planned
) -> tuple[Spectrum, list[dict[str, float]], Conversation]:
    """Load the model and measure it. Collective."""
    from oneshot.checkpoint.load import load_model
    from oneshot.distributed.engine import frozen
    from oneshot.patch import spectrum
    from oneshot.patch.attach import attached_update
    from oneshot.patch.guard import pad_id
    from oneshot.patch.job import own_update
    from oneshot.patch.linears import select_linears
    from oneshot.patch.select import draw, hardest

    job, options = planned.job, settings.spectrum
    pad = pad_id(job.tokenizer)
    loaded = load_model(runtime, job.source, job.model_settings)
    linears = select_linears(loaded, settings.repair.targets).targets
    with frozen(runtime, loaded) as model, attached_update(model, own_update(job)):
        drawn = draw(len(job.candidates), settings.select, settings.seed)
        if drawn is None:
            losses = hardest(runtime, model, job.candidates, pad)
            index = losses.index(max(losses))
        else:
            index = drawn.index
        taken, example = planned.candidates[index], job.candidates[index]
        groups = _groups(runtime, settings, planned, model, taken)
        found = spectrum.measure(
            runtime, model, linears, example, groups, pad, rank=options.rank, batch_size=options.batch_size
        )
        sweep = (
            _sweep(runtime, settings, planned, model, linears, example, groups.get(spectrum.OTHERS, []))
            if options.sweep
            else []
        )
    return found, sweep, taken


def _groups(
    runtime: Runtime, settings: Settings, planned: Planned, model: Any, taken: Conversation
) -> dict[str, list[Encoded]]:
    """The conversations whose gradients are compared with the example's, by group; empty groups are left out."""
    from oneshot.data.encoding import encode
    from oneshot.measure.generate import generate_answers
    from oneshot.patch.spectrum import OTHERS

    job, count = planned.job, settings.spectrum.samples
    rows = {OTHERS: _some([row for row in planned.pool if row.prompt != taken.prompt], count, settings.seed)}
    groups = {
        name: [encode(row, job.tokenizer, planned.length) for row in found]
        for name, found in {**rows, **planned.others}.items()
    }
    guard = job.guard[:count]
    if guard:
        answers = generate_answers(
            model, job.tokenizer, guard, runtime, max_new_tokens=settings.repair.guard_tokens,
            batch_size=settings.score.batch_size,
        )  # fmt: skip
        groups["guard"] = [_answered(p, a, job.tokenizer) for p, a in zip(guard, answers) if a.strip()]
    return {name: found for name, found in groups.items() if found}


def _answered(prompt: list[dict[str, str]], answer: str, tokenizer: Any) -> Encoded:
    from oneshot.data.encoding import IGNORE, Encoded, encode_prompt

    start = encode_prompt(prompt, tokenizer)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return Encoded(start + ids, [IGNORE] * len(start) + ids)


def _sweep(
    runtime: Runtime,
    settings: Settings,
    planned: Planned,
    model: Any,
    linears: Any,
    example: Encoded,
    others: list[Encoded],
) -> list[dict[str, float]]:
    from oneshot.patch import project
    from oneshot.patch.guard import build_batch, pad_id
    from oneshot.patch.linears import shape_of

    job, options = planned.job, settings.spectrum
    most = min(len(example.input_ids), max(min(shape_of(module)) for module in linears.values()))
    ranks = options.ranks or [rank for rank in SWEPT if rank < most] + [most]
    tokens = settings.repair.guard_tokens
    batch = build_batch(runtime, model, job.tokenizer, example, job.guard, answer_tokens=tokens)
    return project.sweep(
        runtime,
        model,
        linears,
        example,
        batch,
        pad_id(job.tokenizer),
        ranks=ranks,
        alphas=options.alphas,
        others=others,
    )


def _show(
    settings: Settings,
    run_dir: Path,
    planned: Planned,
    found: Spectrum,
    sweep: list[dict[str, float]],
    example: Conversation,
    seconds: float,
    console: Console,
) -> None:
    """Print the table; write spectrum.json and spectrum.html."""
    from oneshot.report.runfolder import versions
    from oneshot.report.spectrum import JSON, console_table, sweep_table, write_spectrum

    toy = planned.job.model_settings.path is None or run_dir in Path(str(settings.model.path)).parents
    facts = {
        "model": "toy world, fine-tuned" if toy else str(settings.model.path),
        "world_size": planned.job.runtime.world_size,
        "seed": settings.seed,
        "example": {"id": example.id, "prompt": example.prompt[-1]["content"], "response": example.response},
        "groups": {name: len(each) for name, each in found.each.items()},
        "notes": planned.notes,
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
    page = write_spectrum(run_dir, found, facts, sweep)
    console.print(console_table(found))
    if sweep:
        console.print(sweep_table(sweep))
    for note in planned.notes:
        console.print(f"Note: {note}", highlight=False)
    console.print(f"Figures: {page}\nAll values: {run_dir / JSON}", highlight=False)


if __name__ == "__main__":
    main()
