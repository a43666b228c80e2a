"""The third step of a repair: from a batch to an update, under the watch, with the path that led there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from oneshot.checkpoint.adapters.update import Update
from oneshot.data.encoding import IGNORE
from oneshot.data.turns import runs
from oneshot.distributed.steps import Going, steps
from oneshot.patch.bench import Bench
from oneshot.patch.guard import RepairBatch
from oneshot.patch.halving import Trial
from oneshot.patch.path import ATTEMPTS, REFUSABLE, SAFE_MARGIN, Attempt, Watch
from oneshot.patch.probes import Watched, build_probes, read_probes
from oneshot.patch.seen import Seen, counted
from oneshot.patch.trace import Tracer

_CALLED = ("repair", "repair, second attempt")  # one for each of ATTEMPTS


@dataclass(frozen=True)
class Solution:
    """What a repair came to.

    Attributes:
        update: what to add to the checkpoint (of an adapter: to its base) to get the repaired model
        stopped_by: why the repair ended, for people
        trace: one record per epoch
        facts: figures of the method, for the report; with kept, the epoch and guard weight of the state that was kept
        watch: what looked at it; none where nothing did
        seen: which prompts it could count; none where nothing was to look
    """

    update: Update
    stopped_by: str = "epochs"
    trace: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    watch: Watch[Any] | None = None
    seen: Seen | None = None


def solve(
    bench: Bench,
    batch: RepairBatch,
    index: int,
    listen: Callable[[dict[str, Any]], None] | None = None,
    begun: Trial | None = None,
    attempts: int = ATTEMPTS,
) -> Solution:
    """Repair with one candidate, under the watch where there is one; once more with another weight of the guard where
    no epoch was good. Nothing is attached to the model before and after. Collective.

    Args:
        batch: with the candidate in row 0
        index: of the candidate
        listen: told of every epoch
        begun: the repair with it, if it has been tried out: it goes on from there
        attempts: how often it is tried at most, ``ATTEMPTS`` being the most
    """
    recipe, trial = bench.request.recipe, begun or begin(bench, batch, index)
    watch, tracer, under_way = trial.watched(), trial.attempt.tracer, list[Going]()
    whole: tuple[Update, dict[str, Any]] | None = None  # of a path that ended before there was an epoch to look at

    def told(record: dict[str, Any]) -> None:
        under_way[-1].at(record["epoch"], f"loss {record['loss']:.4f}")
        if listen:
            listen(record)

    for number in range(attempts if watch else 1):
        with steps(_CALLED[number], recipe.epochs, "epochs", always=True) as going:
            under_way.append(going)
            if number == 0:
                tracer.tell(told)
            update, facts = trial.finish()
        if watch is None:
            break
        if watch.best is None:
            whole = update, facts
            with bench.patched(update):
                watch.look(lambda: None, epoch=trial.epochs, guard_weight=trial.attempt.guard_weight)
        weight = watch.next_weight(trial.attempt.guard_weight)
        if not weight or number + 1 == attempts:
            break
        attempt = Attempt(tracer, weight, watch)
        trial = Trial(recipe.method.solve(bench, batch, attempt), attempt)
    if watch is not None and watch.kept is None and whole is not None:  # the second attempt was no better
        update, facts = whole
    seen = counted(_watched(bench, index))[1] if bench.refusable else None
    if watch is None:
        return Solution(update, trace=tracer.records, facts=facts, seen=seen)
    return Solution(update, watch.reason(), tracer.records, {**facts, "kept": watch.at}, watch, seen)


def begin(bench: Bench, batch: RepairBatch, index: int) -> Trial:
    """Begin a repair, unwatched so far, with the recipe's weight of the guard; it has not gone an epoch yet.

    Args:
        batch: with the candidate in row 0
        index: of the candidate
    """
    recipe = bench.request.recipe
    attempt = Attempt(Tracer(), recipe.guard_weight)
    return Trial(recipe.method.solve(bench, batch, attempt), attempt, partial(_watch, bench, index))


def _watch(bench: Bench, index: int) -> Watch[Any] | None:
    """What looks at the repair after every epoch; none where it is not wanted, or no prompt counts. Collective."""
    request, recipe = bench.request, bench.request.recipe
    if not bench.refusable:
        return None
    assert recipe.bounds is not None
    watched, _ = counted(_watched(bench, index))
    if not watched.refusable and not watched.held:
        return None
    with bench.unpatched() as model:
        probes = build_probes(request.runtime, model, request.tokenizer, watched, answer_tokens=recipe.guard_tokens)
        apart = read_probes(request.runtime, model, probes).apart if watched.taught else 0.0
    return Watch(lambda: read_probes(request.runtime, bench.model, probes), recipe.bounds.starting(apart))


def _watched(bench: Bench, index: int) -> Watched:
    """What there is to look at. Of the requests to be refused the example's own is left out: the repair learns it."""
    request = bench.request
    example, its = request.candidates[index], request.conversations[index].prompt
    first, stop = list(runs([label != IGNORE for label in example.labels]))[-1]  # of several answers the last
    refusal = example.input_ids[first:stop]
    refusable = [each for each in bench.refusable if each[0] != its][:REFUSABLE]
    taught = bench.teacher.held if bench.teacher else []
    held = [*bench.held, *((lesson.prompt, lesson.answer) for lesson in taught)]
    spoken, likely = (bench.teacher.refusals, bench.teacher.likely) if bench.teacher else ({}, {})
    asked = [prompt[-1]["content"] for prompt, _ in refusable]
    said = [spoken.get(text) for text in asked]
    own = [request.tokenizer(text, add_special_tokens=False)["input_ids"] if text else refusal for text in said]
    return Watched(
        refusal, refusable, held, [(lesson.logits, lesson.margin < -SAFE_MARGIN) for lesson in taught],
        [(ids, likely.get(text, math.nan)) for ids, text in zip(own, asked)],
    )  # fmt: skip
