"""Whether a run that is gone on with has the settings that it began with."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oneshot.errors import UserError, first_line
from oneshot.reading import limited, load_yaml
from oneshot.settings.kinds import descend
from oneshot.settings.run import Settings, to_dict

# what changes how a run goes, and not what it comes to
FREE = (
    "out", "preflight", "hang_minutes", "resume", "log_with", "delete_degraded", "require", "offline", "profile",
    "push_to_hub", "push_public", "push_degraded",
    "debug", "plan",
    "model.stock_io", "finetune.save_every", "finetune.keep", "finetune.state_moments", "finetune.cache",
)  # fmt: skip
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
    default, then, now = (dict(_flat(values)) for values in (to_dict(Settings()), before, to_dict(settings)))
    # a part, a set or a method's rate that is gone; not a setting that there was in an older version
    gone = [path for path in then if path not in now and functools.reduce(descend, path, Settings) is not None]
    said = []
    for path in (*now, *gone):
        name = ".".join(path)
        if any(name == free or name.startswith(f"{free}.") for free in FREE) or not counts(name):
            continue
        was, is_now = (values.get(path, default.get(path)) for values in (then, now))
        if was != is_now:
            said.append(f"{name} was {_short.repr(was)} and is {_short.repr(is_now)}")
    return said


def _flat(values: Mapping[str, Any], *before: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (names, value) of all that is no mapping, and of empty ones."""
    for name, value in values.items():
        path = (*before, str(name))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, *path)
        else:
            yield path, value
