"""The third step of a repair: from a batch to an update, under the watch, with the path that led there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oneshot.checkpoint.update import Update
from oneshot.data.encoding import IGNORE
from oneshot.patch.bench import Bench
from oneshot.patch.guard import RepairBatch
from oneshot.patch.path import ATTEMPTS, REFUSABLE, Attempt, Watch
from oneshot.patch.probes import build_probes, read_probes
from oneshot.patch.trace import Tracer


@dataclass(frozen=True)
class Solution:
    """What a repair came to.

    Attributes:
        update: what to add to the checkpoint (of an adapter: to its base) to get the repaired model
        stopped_by: why the repair ended, for people
        trace: one record per epoch
        facts: figures of the method, for the report; with kept, the epoch and guard weight of the state that was kept
        watch: what looked at it; none where nothing did
    """

    update: Update
    stopped_by: str = "epochs"
    trace: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    watch: Watch[Any] | None = None


def solve(
    bench: Bench,
    batch: RepairBatch,
    index: int,
    listen: Callable[[dict[str, Any]], None] | None = None,
    *,
    attempts: int = ATTEMPTS,
) -> Solution:
    """Repair with one candidate, under the watch where there is one; once more with another weight of the guard where
    no epoch was good. Nothing is attached to the model before and after. Collective.

    Args:
        batch: with the candidate in row 0
        index: of the candidate
        listen: told of every epoch
        attempts: weights of the guard to try; one candidate among several is not worth more than one
    """
    recipe, tracer, watch = bench.request.recipe, Tracer(listen), _watch(bench, index)
    weight: float | None = recipe.guard_weight
    for _ in range(attempts if watch else 1):
        assert weight is not None
        update, facts = recipe.method.solve(bench, batch, Attempt(tracer, weight, watch))
        weight = watch.next_weight(weight) if watch else None
        if not weight:
            break
    if watch is None:
        return Solution(update, trace=tracer.records, facts=facts)
    return Solution(update, watch.reason(), tracer.records, {**facts, "kept": watch.at}, watch)


def _watch(bench: Bench, index: int) -> Watch[Any] | None:
    """What looks at the repair after every epoch; none where it is not wanted, or there are no prompts. Collective.

    Of the requests to be refused the example's own is left out: the repair learns from it.
    """
    request, recipe = bench.request, bench.request.recipe
    if not bench.answered:
        return None
    assert recipe.bounds is not None
    example, own = request.candidates[index], request.conversations[index].prompt
    refusal = [token for token, label in zip(example.input_ids, example.labels) if label != IGNORE]
    refusable = [each for each in bench.answered[: -len(request.held)] if each[0] != own][:REFUSABLE]
    held = bench.answered[-len(request.held) :]
    with bench.unpatched() as model:
        probes = build_probes(
            request.runtime, model, request.tokenizer, refusal, refusable, held, answer_tokens=recipe.guard_tokens
        )
    return Watch(lambda: read_probes(request.runtime, bench.model, probes), recipe.bounds)
