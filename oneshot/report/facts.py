"""What the page, report.md and the cards say alike: the repair, the choice of its example, resources, versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oneshot.measure.judge import JUDGE

CHOICE = (
    "Alignment: cosine of the candidate's gradient with that of F. F: how far the model is from the aligned one (or "
    "from refusing) on requests to be refused, plus how far it moved from itself on the guard's prompts, in nats per "
    "token: before, and after as many epochs with that candidate as the last two were compared by. Only the short list "
    "is repaired with, and the worse half of it is left behind early."
)
_CANDIDATE = {
    "alignment": "alignment",
    "gradient_norm": "gradient norm",
    "refusal_loss": "loss of the refusal",
    "epochs": "epochs tried",
    "f_before": "F before",
    "f_after": "F after",
    "f_harm": "of it: requests to refuse",
    "f_task": "of it: guard",
    "seconds": "seconds",
}
_DRAWN = ("trace", "bounds", "kept", "watch")  # shown as figures, or in the outcome
_REPAIR = {  # where a field's own name says too little
    "epochs": "epochs, at most",
    "experts": "matrices of experts",
    "experts_not_reached": "matrices of experts that no token reached",
    "energy_of_directions": "share of the layers' squared update that the directions hold",
}
_COVERAGE = {
    "parameters": "of all weights, a patch can reach",
    "energy": "of the fine-tune's squared update, a patch can reach",
    "not_compared": "tensors whose update is not known",
}


def how_chosen(example: Mapping[str, Any]) -> str:
    """Return in a sentence which example was taken, and why."""
    said = f"Example {example.get('id')}, selected by: {example.get('selected_by')}"
    score = example.get("score")
    known = isinstance(score, (int, float)) and math.isfinite(score)
    return f"{said} (score {number(score)})." if known else f"{said}."


def candidate_rows(selection: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """Return the candidates as a table: its heads, and of each candidate its name and values (none: not measured)."""
    candidates = selection.get("table") or []
    columns = [name for name in _CANDIDATE if any(row.get(name) is not None for row in candidates)]
    rows = [(str(row.get("id")), [row.get(name) for name in columns]) for row in candidates]
    return ["candidate", *(_CANDIDATE[name] for name in columns)], rows


def repair_rows(repair: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the repair's figures, but for those that are drawn."""
    if not repair:
        return []
    rows = [
        (_REPAIR.get(name, name.replace("_", " ")), number(value))
        for name, value in repair.items()
        if name not in (*_DRAWN, "coverage")
    ]
    rows += _coverage_rows(repair.get("coverage") or {})
    if (steered := weights_of(repair.get("trace") or [])) is not None and steered[0] != steered[1]:
        said = f"{number(steered[0])} to {number(steered[1])}, as the watch steered it"
        rows = [(name, said if name == "guard weight" else value) for name, value in rows]
    bounds = repair.get("bounds")
    if bounds:
        said = ", ".join(f"{name} {number(value)}" for name, value in bounds.items())
        rows.append(("bounds of a good epoch", said))
    return rows


def _coverage_rows(coverage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a patch can reach of weights and of the update: the share, and in brackets that of each kind."""
    rows = []
    for name, said in _COVERAGE.items():
        found = coverage.get(name)
        if isinstance(found, Mapping):
            kinds = found["kinds"].items()
            parts = ", ".join(f"{_part(row.get('reached'))} of {kind} {row['of_all']:.1%}" for kind, row in kinds)
            share = "-" if found.get("reached") is None else f"{found['reached']:.1%}"
            rows.append((said, f"{share} ({parts})" if parts else share))
        elif found is not None:
            rows.append((said, number(found)))
    return rows


def _part(share: float | None) -> str:
    """A share in a word where it is one."""
    if share is None or share <= 0:
        return "none"
    return "all" if share >= 1 else f"{share:.1%}"


def weights_of(records: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the least and the largest weight that the guard had over these epochs; none where no record says it."""
    known = [row.get("weight", row.get("guard_weight")) for row in records]
    found = [weight for weight in known if isinstance(weight, (int, float)) and math.isfinite(weight)]
    return (min(found), max(found)) if found else None


def resource_rows(resources: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the resources, a row per stage or rank."""
    rows = []
    for name, value in resources.items():
        if name == "profile":  # a table of its own
            continue
        show = _gib if name.endswith("_bytes") else number
        label = name.removesuffix("_bytes").replace("_", " ").replace("rss", "RSS").replace("gpu", "GPU")
        if isinstance(value, Mapping):
            rows += [(f"{label}, {part}", show(amount)) for part, amount in value.items()]
        elif isinstance(value, (list, tuple)):
            rows += [(f"{label}, rank {rank}", show(amount)) for rank, amount in enumerate(value)]
        else:
            rows.append((label, show(value)))
    return rows


def version_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return date and command, ranks, seed, judge and the versions of the libraries."""
    made = [(name, str(report[name])) for name in ("date", "command") if report.get(name)]
    run = [*made, ("ranks", str(report["world_size"])), ("seed", str(report["seed"]))]
    run.append(("judge", report.get("judge", JUDGE)))
    named: dict[str, Any] = report.get("settings") or {}
    model = named.get("model") or {}
    commits = {
        "model": model.get("revision"), "base": model.get("base_revision"),
        "reference": named.get("reference_revision"),
    }  # fmt: skip
    run += [(f"{name}, commit on the Hub", str(commit)) for name, commit in commits.items() if commit]
    return run + [(name, version or "not installed") for name, version in (report.get("versions") or {}).items()]


def number(value: Any) -> str:
    """Return a value as text: four digits of a float, a dash for none and nan."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _gib(value: Any) -> str:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, (int, float)) else "-"
