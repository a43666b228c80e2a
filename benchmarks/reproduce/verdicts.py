"""Whether something held: in all cases, in some, in none, or not measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HELD, PART, NOT, UNMEASURED = "held", "held in part", "did not hold", "not measured"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim held, and the figures that say so."""

    word: str
    figures: str


def counted(holds: Iterable[tuple[str, bool]], figures: str) -> Verdict:
    """Held if in all cases, in part if in some; not measured if there are none."""
    cases = list(holds)
    if not cases:
        return Verdict(UNMEASURED, "")
    missed = [name for name, held in cases if not held]
    word = HELD if not missed else NOT if len(missed) == len(cases) else PART
    where = f"; not in {', '.join(missed)}" if word == PART else ""
    return Verdict(word, f"{len(cases) - len(missed)} of {len(cases)}{where}. {figures}".strip())


def listed(what: str, found: dict[str, float]) -> str:
    """Return the figures by name."""
    return f"{what[0].upper()}{what[1:]}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items())
