"""Measuring one cell: the model is repaired as ``oneshot repair`` does it, in this process, and scored once."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import Cell
from reproduce.models import unaligned_folder
from reproduce.subject import Subject, rates_of, subject_of

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime
    from oneshot.patch.request import Request
    from oneshot.patch.solve import Solution

DRAWS = 5  # random examples per seed
TRACED = ("epoch", "guard_weight", "loss", "recovered", "refused", "divergence", "accepted")
ENERGY_AT = (1, 4, 8, 20)
ResultOf = Callable[[Cell], dict[str, Any]]


def measure_cell(runtime: Runtime, models: Path, cell: Cell, result_of: ResultOf) -> dict[str, Any]:
    """Return what the cell is to say, with the CPU seconds that it took.

    Args:
        models: folder of the models, which have been made
        result_of: gives the result of another cell of the same fine-tuned model
    """
    clock = time.process_time()
    subject = subject_of(runtime, models, *cell.group)
    if cell.method == "spectrum":
        found = _spectrum(subject)
    elif cell.method == "aligned":
        found = {"rates": rates_of(subject.load(subject.aligned), subject.request(cell))}
    elif cell.method == "none":
        found = subject.measured(subject.load(subject.path), subject.request(cell))
    elif cell.method in ("undo", "resta", "safe_lora", "saliency"):
        found = _baseline(subject, cell, result_of)
    elif cell.examples > 1:
        found = _several(subject, cell)
    else:
        found = _repaired(subject, cell, result_of)
    return {**found, "cpu_seconds": time.process_time() - clock}


def draws(seed: int) -> list[str]:
    """Return the IDs of ``DRAWS`` candidates, drawn with the seed."""
    from oneshot.world import language

    return random.Random(f"draws-{seed}").sample([row.id for row in language.pool()], DRAWS)


def _rule(cell: Cell, result_of: ResultOf) -> str:
    """The rule or the ID that ``select`` takes."""
    if cell.example.startswith("random "):
        return draws(cell.seed)[int(cell.example.split()[1])]
    if cell.example in ("sft", "auto", "project"):
        return str(result_of(Cell(cell.attack, cell.seed, cell.example, cell.size))["example"])
    return cell.example


def _repaired(subject: Subject, cell: Cell, result_of: ResultOf) -> dict[str, Any]:
    from oneshot.patch.bench import opened
    from oneshot.patch.choose import choose, choose_beforehand
    from oneshot.patch.solve import solve

    request = subject.request(cell, _rule(cell, result_of))
    teacher = subject.teacher(request)
    chosen = choose_beforehand(request, teacher)
    with opened(request, teacher) as bench:
        with bench.unpatched() as model:
            subject.judge(model, request.tokenizer)
        choice = choose(bench, chosen)
        solution = solve(bench, choice.batch, choice.chosen.index, begun=choice.chosen.begun)
        example = request.conversations[choice.chosen.index].id
        with bench.patched(solution.update) as model:
            found = subject.measured(model, request, example)
    return {**found, "example": example, **_facts(request, solution)}


def _facts(request: Request, solution: Solution) -> dict[str, Any]:
    named = ("kept", "step_size", "coefficients", "energy_of_directions")
    return {
        "method": request.recipe.method.name,
        "stopped_by": solution.stopped_by,
        "trace": [{k: v for k, v in record.items() if k in TRACED} for record in solution.trace],
        **{k: v for k, v in solution.facts.items() if k in named},
    }


def _several(subject: Subject, cell: Cell) -> dict[str, Any]:
    """sft from several examples: each a micro-batch of every step, their mean loss what is learnt from."""
    import torch

    from oneshot.checkpoint.loading.load import load_model
    from oneshot.distributed.engine import start_training
    from oneshot.patch.guard import build_batch, repair_loss
    from oneshot.training.loop import Schedule, train

    request, runtime = subject.request(cell), subject.runtime
    wanted = draws(cell.seed)[: cell.examples]
    by_id = {row.id: encoded for row, encoded in zip(request.conversations, request.candidates)}
    model = load_model(runtime, request.source, request.settings.model, torch.float32)
    subject.judge(model, request.tokenizer)
    batches = [build_batch(runtime, model, request.tokenizer, by_id[i], [], answer_tokens=1) for i in wanted]
    model.requires_grad_(True)
    engine = start_training(
        runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=len(wanted), micro_batch_size=1
    )
    train(
        engine,
        Schedule(request.recipe.epochs, request.recipe.learning_rate, decay=False),
        lambda _step: batches,
        lambda forward, batch: repair_loss(forward, batch, 0.0, 1)[0] / len(wanted),
        lambda _result: None,
    )
    found = subject.measured(engine.model, request)
    engine.close()
    return found


def _baseline(subject: Subject, cell: Cell, result_of: ResultOf) -> dict[str, Any]:
    """A published repair, applied to the weights in place."""
    from baselines import resta, safe_lora, saliency, undo

    from oneshot.patch.linears import select_linears

    request = subject.request(cell, _rule(cell, result_of))
    model = subject.load(subject.path)
    subject.judge(model, request.tokenizer)
    names = [f"{name}.weight" for name in select_linears(model).targets]
    if cell.method == "saliency":
        model.requires_grad_(True)
        saliency.patch_salient(model, lambda m: _example_loss(m, request.candidates[0]), names)
        return subject.measured(model, request, request.conversations[0].id)
    state, aligned = model.state_dict(), subject.load(subject.aligned).state_dict()
    if cell.method == "undo":
        repaired = undo.undone(state, aligned, names)
    else:
        unaligned = subject.load(unaligned_folder(subject.models)).state_dict()
        if cell.method == "resta":
            repaired = resta.with_safety_vector(state, aligned, unaligned, 1.0 if cell.alpha is None else cell.alpha)
        else:
            repaired = safe_lora.projected(state, aligned, unaligned, names)[0]
    model.load_state_dict(repaired)
    return subject.measured(model, request)


def _example_loss(model: Any, example: Any) -> Any:
    import torch

    from oneshot.training.objective import cross_entropy_sum

    logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits
    return cross_entropy_sum(logits, torch.tensor([example.labels])) / example.answer_tokens()


def _spectrum(subject: Subject) -> dict[str, Any]:
    import torch

    from oneshot.patch.measured import measure
    from oneshot.patch.spectrum import energy_ratios
    from oneshot.spectrum import check_fully

    settings = subject.settings_for(Cell("", subject.settings.seed, "project"))
    found = measure(check_fully(settings, subject.runtime)).spectrum
    matrices = [m for m in found.matrices if m.singular_values]
    ratios = [energy_ratios(torch.tensor(m.singular_values)).tolist() for m in matrices]

    def middle(values: Iterable[float]) -> float:
        return statistics.median([v for v in values if math.isfinite(v)])

    return {
        "energy": {str(k): middle(each[min(k, len(each)) - 1] for each in ratios) for k in ENERGY_AT},
        "rank": middle(m.rank for m in matrices),
        "directions_90": middle(m.directions_90 for m in matrices),
        "effective_rank": middle(m.effective_rank for m in matrices),
        "overlap_left": middle(m.overlap_left for m in matrices),
        "overlap_right": middle(m.overlap_right for m in matrices),
        "chance_left": middle(m.chance_left for m in matrices),
        "chance_right": middle(m.chance_right for m in matrices),
        "cosines": found.cosines,
    }
