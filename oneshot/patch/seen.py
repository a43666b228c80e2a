"""Which of the watch's prompts count: those that the unpatched model answers.

Garbled, empty or refusing answers say nothing of what a repair moves. On a model of another language or domain those to
the shipped prompts may be such.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from oneshot.measure.judge import verdict
from oneshot.patch.probes import Watched

TO_REFUSE, HARMLESS = "requests to be refused", "harmless prompts"
_ENOUGH = 0.5  # share of the prompts that must count, or the watch is said to be blind


@dataclass(frozen=True)
class Seen:
    """How many prompts the watch was to look at, by what they are, and which of them do not count, by why.

    Attributes:
        looked: kind -> number
        left_out: kind -> verdict on the unpatched model's answer -> number
    """

    looked: dict[str, int]
    left_out: dict[str, dict[str, int]]

    @property
    def note(self) -> str:
        """What was left out and what to do, in a sentence; "" where nothing was."""
        said = " and ".join(self._counts(kind) for kind in self.looked if self.left_out[kind])
        if not said:
            return ""
        unknown = any(why != "refused" or kind == HARMLESS for kind in self.looked for why in self.left_out[kind])
        more = ": give prompts in your model's language and domain with --watch_prompts" if unknown else ""
        return f"The watch does not count {said}, by the unpatched model's answers{more}."

    @property
    def blind(self) -> str:
        """Why the watch saw too little to be relied on, as what is said of it; "" where it saw enough.

        A request that is refused already needs no repair, and is nothing to be blind to.
        """
        if not self.looked[TO_REFUSE]:
            return f"had no {TO_REFUSE} to look at"
        mute = {
            TO_REFUSE: sum(n for why, n in self.left_out[TO_REFUSE].items() if why != "refused"),
            HARMLESS: sum(self.left_out[HARMLESS].values()),
        }
        found = [kind for kind, number in mute.items() if number > _ENOUGH * self.looked[kind]]
        return f"could not count {' and '.join(map(self._counts, found))}" if found else ""

    def _counts(self, kind: str) -> str:
        left = self.left_out[kind]
        why = ", ".join(f"{number} {verdict}" for verdict, number in left.items())
        return f"{sum(left.values())} of {self.looked[kind]} {kind} ({why})"


def counted(watched: Watched) -> tuple[Watched, Seen]:
    """Return what is looked at without the prompts that do not count, and how many those are."""
    first = len(watched.held) - len(watched.taught)
    # what the aligned model refuses is where the repaired one should be, too
    why = {
        TO_REFUSE: [_mute(answer) for _, answer in watched.refusable],
        HARMLESS: [_mute(answer, refusing=i < first) for i, (_, answer) in enumerate(watched.held)],
    }
    refusable, held = ([i for i, said in enumerate(each) if not said] for each in why.values())
    kept = dataclasses.replace(
        watched,
        refusable=[watched.refusable[i] for i in refusable],
        words=[watched.words[i] for i in refusable] if watched.words else watched.words,
        held=[watched.held[i] for i in held],
        taught=[watched.taught[i - first] for i in held if i >= first],
    )
    left_out = {kind: dict(Counter(filter(None, each))) for kind, each in why.items()}
    return kept, Seen({kind: len(each) for kind, each in why.items()}, left_out)


def _mute(answer: str, *, refusing: bool = True) -> str:
    """Why a prompt with this answer does not count; "" where it does, as refusals do where not ``refusing``."""
    said = verdict(answer)
    return "" if said == "answered" or (said == "refused" and not refusing) else said
