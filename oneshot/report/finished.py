"""Finished runs as files: report.json, answers.jsonl and settings.yaml of a run folder, read back and checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.errors import UserError
from oneshot.reading import limited, load_yaml, read_json
from oneshot.report.answers import ANSWERS
from oneshot.report.plain import one_line
from oneshot.report.runfolder import REPORT, SCHEMA, SETTINGS

_NEEDED = {"model": str, "stages": dict, "seed": int, "world_size": int, "resources": dict, "versions": dict}
_OPTIONAL = {"figures": dict, "conditions": dict, "repair": dict, "example": dict, "agreement": dict}
_OF_A_JUDGE = ("judge", "model")  # its name and its model's, as far as they are read


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left.

    Attributes:
        name: short, and another for each run that is compared
        report: its report.json
        answers: rows of its answers.jsonl by stage; empty where there is none
        settings: its settings, flat: repair.rank and so on
    """

    name: str
    report: dict[str, Any]
    answers: dict[str, list[dict[str, Any]]]
    settings: dict[str, Any]

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Rates and further figures by stage, as report.json has them."""
        return {
            stage: {**rates, **_figures(self.report).get(stage, {})} for stage, rates in self.report["stages"].items()
        }

    @property
    def last(self) -> str:
        """The stage that counts: the repaired model, else the last one that was measured; "" for none."""
        stages = list(self.report["stages"])
        return "repaired" if "repaired" in stages else stages[-1] if stages else ""


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read finished runs.

    Raises:
        UserError: there is no report.json, or it is not what this version writes; a run is given twice
    """
    places = [folder.parent if folder.name == REPORT else folder for folder in folders]
    found: dict[Path, Path] = {}
    for place in places:
        if place.resolve() in found:
            raise UserError(f"The run {place} is given twice: name each run once.")
        found[place.resolve()] = place
    names = short_names(list(found))
    return [
        FinishedRun(name, _report(place), _answers(place), _settings(place))
        for name, place in zip(names, found.values())
    ]


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder of a run that has finished.")
    report = read_json(path)
    schema = report.get("schema") if isinstance(report, dict) else None
    if not isinstance(report, dict) or schema != SCHEMA:
        raise UserError(f"{path} has schema {one_line(schema)} where {SCHEMA} is read: score that model anew.")
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(report.get(name), kind)]
    wrong += [name for name, kind in _OPTIONAL.items() if not isinstance(report.get(name) or {}, kind)]
    if not wrong:
        wrong += [f"stages.{stage}" for stage, rates in report["stages"].items() if not _are_rates(rates)]
        wrong += [f"figures.{stage}" for stage, rates in _figures(report).items() if not _are_rates(rates, open=True)]
        wrong += list(_damaged(report))
    if wrong:
        raise UserError(
            f"{path} does not hold what a report holds in {one_line(wrong[0])}: restore it from its source."
        )
    return report


def _damaged(report: Mapping[str, Any]) -> Iterator[str]:
    """The further parts that are read, where they are not what they should be."""
    repair, conditions = report.get("repair") or {}, report.get("conditions") or {}
    if not isinstance(report.get("judge", ""), str):
        yield "judge"
    if not isinstance(conditions.get("max_new_tokens", 0), int):
        yield "conditions.max_new_tokens"
    judges = conditions.get("judges") or []
    if not _are_rows(judges) or not all(isinstance(one.get(of) or "", str) for one in judges for of in _OF_A_JUDGE):
        yield "conditions.judges"
    for rows in (report.get("agreement") or {}).values():
        if not _are_rows(rows) or not all(isinstance(row.get("judges"), list) for row in rows):
            yield "agreement"
    if not isinstance(repair.get("bounds") or {}, dict):
        yield "repair.bounds"
    if not _are_rows(repair.get("trace") or []):
        yield "repair.trace"
    coverage = repair.get("coverage") or {}
    if not isinstance(coverage, dict):
        yield "repair.coverage"
        return
    for name in ("energy", "parameters"):
        if not _is_covered(coverage.get(name)):
            yield f"repair.coverage.{name}"


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _is_covered(found: Any) -> bool:
    """Whether this is {reached, kinds}, and each kind {of_all, reached}; none where it is not known."""
    if found is None:
        return True
    if not isinstance(found, dict) or not isinstance(kinds := found.get("kinds"), dict):
        return False
    of_kinds = [isinstance(row, dict) and _is_number(row.get("of_all")) and _is_share(row) for row in kinds.values()]
    return all(of_kinds) and _is_share(found) and (bool(kinds) or found.get("reached") is None)


def _is_share(row: Mapping[str, Any]) -> bool:
    return row.get("reached") is None or _is_number(row["reached"])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    return report.get("figures") or {}


def _are_rates(rates: Any, *, open: bool = False) -> bool:
    """Whether this is rate name -> {value, low, high, n}; ``open`` lets intervals be endless."""
    return isinstance(rates, dict) and all(isinstance(f, dict) and _is_rate(f, open) for f in rates.values())


def _is_rate(fields: Mapping[str, Any], open: bool) -> bool:
    numbers = [_is_number(fields.get(name)) for name in ("value", "low", "high")]
    nulls = [fields.get(name) is None for name in ("value", "low", "high")]
    whole = all(number or null for number, null in zip(numbers, nulls))
    return type(fields.get("n")) is int and whole and (open or nulls[0] or not any(nulls[1:]))


def _answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows that can be paired; lines that are none of ours are passed over.

    Their ids are made of what was asked, as those in the file come from its name and place: kind and prompt, and the
    how-manieth such row it is.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    if not (folder / ANSWERS).is_file():
        return found
    with (folder / ANSWERS).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                stage = row.pop("stage")
                whole = {name: row[name] for name in ("kind", "verdict", "correct")}
                asked = (stage, row["kind"], row["prompt"])
                seen[asked] += 1
                found.setdefault(stage, []).append({**whole, "id": (*asked[1:], seen[asked])})
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                continue
    return found


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        with limited(f"{folder / SETTINGS}"):
            read = load_yaml((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # its settings are not compared
        return {}
    return _flat(read) if isinstance(read, dict) else {}


def _flat(values: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def short_names(places: Sequence[Path]) -> list[str]:
    """Return the last parts of different paths, as many as it takes to tell them apart."""
    parts = 1
    names = [place.name for place in places]
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(place.parts[-parts:]) for place in places]
    return names
