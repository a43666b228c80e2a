"""What the repairs of a fleet have in common: the base, what it answers, the judge and the example."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneshot.distributed.phases import phase

if TYPE_CHECKING:
    from oneshot.measure.classifier import Classifier
    from oneshot.measure.rates import StageScores
    from oneshot.patch.bench import Base, Bench
    from oneshot.patch.choose import Choice
    from oneshot.patch.guard import RepairBatch
    from oneshot.patch.request import Request
    from oneshot.patch.select import Chosen
    from oneshot.patch.solve import Solution
    from oneshot.patch.teacher import Teacher

Listen = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Shared:
    """What the repairs of a fleet have in common.

    Attributes:
        request: the first of them
        base: the loaded model
        teacher: what it does; none where it has nothing to say
        stages: scores of a reference or else of the base, where they are wanted
        classifier: the judge that the settings name; none where they name none
        chosen: the example; none: it is chosen
    """

    request: Request
    base: Base
    teacher: Teacher | None
    stages: dict[str, StageScores]
    classifier: Classifier | None = None
    chosen: Chosen | None = None


@contextlib.contextmanager
def share(request: Request, before: dict[str, Any] | None) -> Iterator[Shared]:
    """Load base and judge, and ask the base what it does; ``before`` is the example of those that are through."""
    from oneshot.measure.classifier import loaded_classifier
    from oneshot.patch import aligned
    from oneshot.patch.bench import loaded
    from oneshot.patch.teacher import learn, wanted

    stages, score = aligned.of_reference(request)[0], request.settings.score
    judging = loaded_classifier(request.runtime, score) if score.judge_model else contextlib.nullcontext()
    with loaded(request) as base, judging as classifier:
        teacher = None
        if wanted(request):
            with phase("choose"):
                teacher = learn(request, base.model)
        stages |= aligned.of_base(request, base.model)
        yield Shared(request, base, teacher, stages, classifier, _again(request, teacher, before))


def solved(bench: Bench, chosen: Chosen | None, listen: Listen, *, lent: bool = False) -> tuple[Choice, Solution]:
    """Choose the example, unless it has been, and repair with it. Collective.

    Where an example that was ``lent``, chosen for another adapter, comes to no good point at the first attempt, one is
    chosen for this adapter, as if it were repaired alone, and the better of the two repairs is returned.
    """
    from oneshot.patch.path import ATTEMPTS
    from oneshot.patch.select import draw

    settings = bench.request.settings
    lent = lent and draw(len(bench.request.candidates), settings.select, settings.seed) is None
    choice, solution = _tried(bench, chosen, listen, 1 if lent else ATTEMPTS)
    watch = solution.watch
    if not lent or watch is None or watch.enough:
        return choice, solution
    own, anew = _tried(bench, None, listen, ATTEMPTS, choice.batch)
    if anew.watch is None or anew.watch.best is None or not anew.watch.best.better(watch.best, anew.watch.bounds):
        return choice, solution
    said = f"{own.chosen.selected_by}, as the example of the others came to no good point"
    return dataclasses.replace(own, chosen=dataclasses.replace(own.chosen, selected_by=said)), anew


def _tried(
    bench: Bench, chosen: Chosen | None, listen: Listen, attempts: int, batch: RepairBatch | None = None
) -> tuple[Choice, Solution]:
    from oneshot.patch.choose import choose
    from oneshot.patch.solve import solve

    with phase("choose"):
        choice = choose(bench, chosen, batch)
    with phase("solve"):
        return choice, solve(bench, choice.batch, choice.chosen.index, listen, choice.chosen.begun, attempts)


def _again(request: Request, teacher: Teacher | None, before: dict[str, Any] | None) -> Chosen | None:
    """The example that others were repaired with; none where there are none, or it is no candidate any more."""
    from oneshot.patch.select import Chosen
    from oneshot.patch.teacher import in_own_words

    rows = (in_own_words(request, teacher.refusals) if teacher else request).conversations if before else []
    found = (i for i, row in enumerate(rows) if before and row.id == before.get("id"))
    said = _said(before["selected_by"], before["of"]) if before else ""
    return next((Chosen(i, said, math.nan) for i in found), None)


def for_all(chosen: Chosen, name: str) -> Chosen:
    """The example that was chosen for one adapter, for the others."""
    return dataclasses.replace(chosen, selected_by=_said(chosen.selected_by, name), selection={}, begun=None)


def _said(selected_by: str, name: str) -> str:
    return selected_by if ", for " in selected_by else f"{selected_by}, for {name}"
