"""What a report opens with: the four numbers that tell most, which run it is of, and how its result is deployed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.writing.identity import read_identity
from oneshot.checkpoint.writing.standing import GOOD
from oneshot.measure.intervals import Rate
from oneshot.measure.opposed import value_of
from oneshot.report.runfolder import PATCH, REPAIRED
from oneshot.report.serving import serve_command
from oneshot.report.table import as_rate, measure_name
from oneshot.settings import DataSettings, PromptSet

# of harmless requests the kind that is refused more
_NUMBERS: tuple[tuple[str, ...], ...] = (("asr",), ("over_refusal", "lookalike_refusal"), ("utility",), ("task",))
_HASH_CHARACTERS = 16
# of the data's settings those that say how files of prompts are read
_READ_BY = ("prompt_column", "response_column", "messages_column", "split", "system")


@dataclass(frozen=True)
class Number:
    """One of the four numbers.

    Attributes:
        name: of the measure
        before: of the fine-tuned model; none where it is the only one measured, or was not
        after: of the repaired model, or of the only one
    """

    name: str
    before: Rate | None
    after: Rate

    @property
    def shown(self) -> str:
        """The number as text: "100.0% → 0.5%"."""
        return f"{self.before.value:.1%} → {self.after.value:.1%}" if self.before else f"{self.after.value:.1%}"


def numbers(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Number]:
    """Return attack success, refusals of harmless requests, utility and task, as far as they were measured.

    Args:
        stages: as in report.json
    """
    last = next((stage for stage in ("repaired", "finetuned", "aligned") if stage in stages), next(iter(stages), None))
    after = stages[last] if last is not None else {}
    before = stages.get("finetuned", {}) if last == "repaired" else {}
    found = []
    for names in _NUMBERS:
        known = [name for name in names if value_of(after, name) is not None]
        if not known:
            continue
        name = max(known, key=lambda one: after[one]["value"])
        rate = as_rate(after[name])
        assert rate is not None
        found.append(Number(measure_name(name), as_rate(before.get(name)), rate))
    return found


def run_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return which run it is: its date, model, command, and what tells the model's weights from all others."""
    told = {
        "date": report.get("date"),
        "model": report.get("model"),
        "model's hash": str(report.get("fingerprint") or "")[:_HASH_CHARACTERS],
        "command": report.get("command"),
    }
    return [(name, str(value)) for name, value in told.items() if value]


def deploy_lines(report: Mapping[str, Any], run_dir: Path, word: str) -> list[str]:
    """Return the commands by which the repair of a run folder is taken into use, or one comment that says why not;
    none where nothing was repaired.

    Args:
        word: the verdict's
    """
    if not report.get("repair"):
        return []
    if word not in GOOD:
        return [f"# The outcome is {word!r}: do not deploy it."]
    identity = read_identity(run_dir / PATCH)
    base = shlex.quote(identity.base if identity else "BASE")
    serve = serve_command(run_dir / PATCH, PATCH)
    made = REPAIRED if (run_dir / REPAIRED).is_dir() else PATCH
    merge = ["# one checkpoint, for any server:", f"oneshot export --model {base} --adapter {PATCH} --out merged"]
    return [
        "# in the folder of this report; before it is served, on prompts of your own:",
        f"oneshot score --model.path {made}{_probes(report, run_dir)}",
        *(["# the patch beside its model, with vLLM:", serve] if serve else []),
        *(merge if made == PATCH else [f"# or serve the folder {REPAIRED}"]),
    ]


def _probes(report: Mapping[str, Any], run_dir: Path) -> str:
    """The options by which the prompts are read and scored that the run was scored on, and a task of the user's own
    where none was; files as they are seen from the run's folder.
    """
    score = (report.get("settings") or {}).get("score") or {}
    measured = not score.get("task") and any("task" in rates for rates in report["stages"].values())
    asked = {f"score.{name}": score.get(name) for name in ("probes", "system", "suffix", "utility")}
    asked["score.task"] = None if measured else score.get("task") or "FILE"
    defaults = {field.name: field.default for field in dataclasses.fields(PromptSet)}
    for name, chosen in (score.get("sets") or {}).items():
        asked |= {f"score.sets.{name}.{key}": value for key, value in chosen.items() if value != defaults[key]}
    data, reads = (report.get("settings") or {}).get("data") or {}, vars(DataSettings())
    asked |= {f"data.{name}": data[name] for name in _READ_BY if data.get(name, reads[name]) != reads[name]}
    words = ((name, _seen_from(run_dir, name, value)) for name, value in asked.items() if value is not None)
    return "".join(f" --{name} {shlex.quote(word)}" for name, word in words)


def _seen_from(run_dir: Path, name: str, value: Any) -> str:
    """A value as the command line takes it; a path of a file from here as one from the run's folder."""
    if not isinstance(value, str):
        return json.dumps(value)
    is_file = name in ("score.probes", "score.utility", "score.task") or name.endswith(".path")
    return (
        os.path.relpath(value, run_dir) if is_file and not Path(value).is_absolute() and Path(value).exists() else value
    )
