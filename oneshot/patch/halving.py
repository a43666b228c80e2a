"""Successive halving: all candidates are repaired with for a few epochs, the better half for more, till one is left.

After Jamieson and Talwalkar (arXiv 1502.07943). A whole repair with each would cost as many repairs as there are
candidates; here all of them together may take little more than one, and the one that is left goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oneshot.distributed.steps import steps
from oneshot.patch.method import finished
from oneshot.patch.objective import Distance
from oneshot.patch.path import Attempt, Watch

if TYPE_CHECKING:
    from oneshot.checkpoint.adapters.update import Update

BUDGET = (
    0.5  # epochs that those who are left behind may take together, over those that a repair may take: it takes half
)
GROWTH = 2.5  # of epochs from rung to rung: the first ones say little
PASSING = 0.02  # nats per token; by what the guard's prompts move in mid-repair beyond that, the guard takes back later


@dataclass
class Trial:
    """A repair under way, which has stopped between two epochs.

    Attributes:
        path: goes on for an epoch each time, see ``Method.solve``
        attempt: what it was begun with
        make_watch: makes what looks at it after every epoch; none where nothing is to
        epochs: so many have been gone
        ended: what the path came to: (update, figures for the report); none while it may go on
        update: as it was at the last stop
    """

    path: Generator[Update, None, tuple[Update, dict[str, Any]]]
    attempt: Attempt
    make_watch: Callable[[], Watch[Any] | None] = lambda: None
    epochs: int = 0
    ended: tuple[Update, dict[str, Any]] | None = None
    update: Update = field(default_factory=dict)

    def advance(self, epochs: int) -> Update:
        """Go on for so many epochs, or to the path's end; return the update as it is then. Collective."""
        for _ in range(epochs):
            try:
                self.update = next(self.path)
                self.epochs += 1
            except StopIteration as end:
                self.ended, self.update = end.value, end.value[0]
                break
        return self.update

    def watched(self) -> Watch[Any] | None:
        """From now on let the watch, which is returned, look at every epoch. Collective."""
        if self.attempt.watch is None:
            self.attempt.watch = self.make_watch()
        return self.attempt.watch

    def finish(self) -> tuple[Update, dict[str, Any]]:
        """Go on to the path's end; return what it came to. Collective."""
        if self.ended is None:
            self.ended = finished(self.path)
            self.update = self.ended[0]
        return self.ended


@dataclass(frozen=True)
class Rung:
    """How many candidates are repaired with up to which epoch, before some are left behind."""

    candidates: int
    epochs: int


def rungs(candidates: int, epochs: int) -> list[Rung]:
    """Return the rungs: candidates are halved and epochs multiplied by ``GROWTH`` until two are left to be compared.

    The first is as long as ``BUDGET`` allows, an epoch at least, which is more than that where they are many. One that
    would not go on from the one before is none: what is left is compared there. None for one candidate.

    Args:
        epochs: of a whole repair, at most
    """
    counts = [candidates]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    if candidates < 2:
        return []
    left = [before - after for before, after in itertools.pairwise([*counts, 1])]
    first = max(1, int(BUDGET * epochs / sum(count * GROWTH**i for i, count in enumerate(left))))
    ends = [min(round(first * GROWTH**i), epochs) for i in range(len(counts))]
    return [Rung(count, end) for count, end, before in zip(counts, ends, [0, *ends]) if end > before]


def _epochs_of(ladder: list[Rung]) -> int:
    """How many epochs all of them take at most."""
    before = [0, *(rung.epochs for rung in ladder)]
    return sum(rung.candidates * (rung.epochs - gone) for rung, gone in zip(ladder, before))


def short_list(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` of the rows, each once: by turns the best aligned and the three least likely refusals."""
    hardest_first = iter(ranked(rows, "refusal_loss"))
    by_turns = [[row, *itertools.islice(hardest_first, 3)] for row in ranked(rows, "alignment")]
    found = {row["candidate"]: row for turn in by_turns for row in turn}
    return list(found.values())[:count]


def ranked(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Return the rows, the highest first, and the first of equal ones."""
    return sorted(rows, key=lambda row: (-row[by], row["candidate"]))


def halve(
    rows: list[dict[str, Any]],
    ladder: list[Rung],
    begin: Callable[[int], Trial],
    judge: Callable[[Update], Distance],
) -> tuple[dict[str, Any], Trial | None]:
    """Repair with each row's candidate, rung by rung; return the best one's row and its repair, which may go on.

    Of equal ones the first is preferred, as it is where there is no rung; nothing has been begun then. What is found is
    added to the rows: ``rungs`` (epochs, F and its terms at each), ``epochs``, ``seconds``; to those of the last rung
    ``f_after``, ``f_harm`` and ``f_task``. Collective; every rank decides by the same numbers.

    Args:
        judge: says of an update where it leaves the model
    """
    alive = [(row, begin(row["candidate"])) for row in rows] if ladder else []
    with steps("candidates tried", _epochs_of(ladder), "epochs") as going:
        for number, rung in enumerate(ladder, start=1):
            alive, before = alive[: rung.candidates], ladder[number - 2].epochs if number > 1 else 0
            for row, trial in alive:
                clock = time.perf_counter()
                if rung is ladder[-1]:
                    trial.watched()  # one of these is the repair
                found = judge(trial.advance(rung.epochs - trial.epochs))
                seen = {"epochs": rung.epochs, "f": found.total, "f_harm": found.harm, "f_task": found.task}
                row.setdefault("rungs", []).append(seen)
                row["epochs"] = trial.epochs
                row["seconds"] = round(row.get("seconds", 0.0) + time.perf_counter() - clock, 3)
                going.add(rung.epochs - before, f"round {number} of {len(ladder)}, {rung.candidates} candidates")
            alive.sort(key=lambda pair: standing(pair[0]))
    for row, _ in alive:
        row |= {"f_after": row["rungs"][-1]["f"], **{k: row["rungs"][-1][k] for k in ("f_harm", "f_task")}}
    return alive[0] if alive else (rows[0], None)


def standing(row: dict[str, Any]) -> tuple[int, float]:
    """What a candidate's row is ordered by, the best first: how many rungs it came, then F at the last of them.

    F's second term counts up to ``PASSING``.
    """
    if "rungs" not in row:
        return 0, math.inf
    last = row["rungs"][-1]
    f = last["f_harm"] + min(last["f_task"], PASSING)
    return -len(row["rungs"]), f if math.isfinite(last["f"]) else math.inf
