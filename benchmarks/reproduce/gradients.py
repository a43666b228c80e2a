"""What is claimed of the safety gradient, held against the spectrum of the fine-tuned toys."""

from __future__ import annotations

import statistics

from reproduce.findings import Findings
from reproduce.sections import STUDIED
from reproduce.verdicts import Verdict, counted


def _spectrum(findings: Findings, name: str) -> list[float]:
    found = (findings.result(STUDIED, seed, {"method": "spectrum"}) for seed in range(findings.seeds))
    return [result[name] for result in found if result is not None]


def cosines(findings: Findings, group: str) -> list[float]:
    """Return each seed's cosine between the example's gradient and the group's."""
    found = (findings.result(STUDIED, seed, {"method": "spectrum"}) for seed in range(findings.seeds))
    return [result["cosines"][group] for result in found if result is not None and group in result["cosines"]]


def low_rank(findings: Findings) -> Verdict:
    needed, possible = _spectrum(findings, "directions_90"), _spectrum(findings, "rank")
    figures = ""
    if needed:
        figures = f"{statistics.median(needed):g} of {statistics.median(possible):g} directions hold 90% of the energy."
    return counted(((f"seed {i}", k <= n / 2) for i, (k, n) in enumerate(zip(needed, possible))), figures)


def shared_subspace(findings: Findings) -> Verdict:
    cases, said = [], []
    for side in ("left", "right"):
        ours, chance = _spectrum(findings, f"overlap_{side}"), _spectrum(findings, f"chance_{side}")
        if ours:
            a, b = statistics.median(ours), statistics.median(chance)
            cases.append((f"the {side} subspaces", a >= 2 * b))
            said.append(f"{side} {a:.2f}, by chance {b:.2f}")
    return counted(cases, f"Overlap {'; '.join(said)}." if said else "")


def opposed(findings: Findings) -> Verdict:
    found = cosines(findings, "harmful")
    figures = f"Cosines {min(found):.3f} to {max(found):.3f}." if found else ""
    return counted(((f"seed {i}", cosine < 0) for i, cosine in enumerate(found)), figures)


def apart(findings: Findings) -> Verdict:
    found = cosines(findings, "guard")
    figures = f"Cosines {min(found):.3f} to {max(found):.3f}." if found else ""
    return counted(((f"seed {i}", abs(cosine) <= 0.2) for i, cosine in enumerate(found)), figures)
