"""Whether a run that is gone on with has the settings that it began with."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oneshot.errors import UserError, first_line
from oneshot.reading import limited, load_yaml
from oneshot.settings.run import Settings, to_dict

# what changes how a run goes, and not what it comes to
FREE = (
    "out", "preflight", "hang_minutes", "resume", "log_with", "delete_degraded", "require", "offline", "profile",
    "push_to_hub", "push_public", "push_degraded",
    "debug", "plan",
    "model.stock_io", "finetune.save_every", "finetune.keep", "finetune.state_moments", "finetune.cache",
)  # fmt: skip
_NOWHERE = object()
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def read(path: Path) -> dict[str, Any]:
    """Return the settings that a run folder holds, as plain values.

    Raises:
        UserError: the file is empty, no YAML, or holds something else
    """
    import yaml

    try:
        with limited(f"{path}"):
            found = load_yaml(path.read_text(encoding="utf-8"))
        why = "it is empty" if found is None else "it holds no settings"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        found, why = None, first_line(error)
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is damaged ({why}), so that it is not known what was run there: give another --out, or remove "
            f"the folder {path.parent}."
        )
    return found


def differences(
    before: Mapping[str, Any], settings: Settings, counts: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Return each setting that would change what the run comes to, with its value then and now.

    Args:
        before: as read from the run's folder; what it lacks had its default
        settings: of the run that goes on
        counts: whether the stage reads a setting, by its full name
    """
    defaults = dict(_flat(to_dict(Settings())))
    said = []
    for name, now in _flat(to_dict(settings)):
        if any(name == free or name.startswith(f"{free}.") for free in FREE) or not counts(name):
            continue
        then = _at(before, name)
        then = defaults.get(name) if then is _NOWHERE else then
        if then != now:
            said.append(f"{name} was {_short.repr(then)} and is {_short.repr(now)}")
    return said


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        if not isinstance(value, Mapping) or not value:
            yield f"{before}{name}", value


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _NOWHERE
        values = values[part]
    return values
