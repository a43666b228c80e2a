"""The adapters of a fleet, and whether a run folder holds the repair of one as it is now."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oneshot.checkpoint.loading.load import find_source
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.reading import read_json, sha256_of
from oneshot.report.finished import read_runs
from oneshot.report.fleet import FLEET, MARKDOWN
from oneshot.report.runfolder import SETTINGS
from oneshot.settings import ModelSettings, Settings, same

OF = "adapter.json"  # in a run folder of the fleet's: SHA-256 of the adapter's files that were repaired


def matched(pattern: str) -> list[Path]:
    """Return the adapter folders that a pattern names, each once, under its own name rather than a link's.

    Raises:
        UserError: there is none, or one has a name that the fleet's folder has a use for
    """
    found = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True)]
    places: dict[Path, Path] = {}
    for place in sorted(found, key=lambda one: (one.is_symlink(), one)):
        if (place / "adapter_config.json").is_file():
            places.setdefault(place.resolve(), place)
    if not places:
        raise UserError(
            f"No adapter folder (with an adapter_config.json) matches {pattern!r}: give --model.paths a pattern such "
            "as 'adapters/*', in quotes."
        )
    for place in places.values():
        if place.name in (FLEET, MARKDOWN):
            raise UserError(f"The adapter folder {place} has the name of the fleet's own table: rename it.")
    return sorted(places.values())


def check_one_base(runtime: Runtime, models: Sequence[ModelSettings]) -> None:
    """Raise UserError where two adapters have different bases; one that cannot be read is left for its turn."""
    bases: dict[Path, str] = {}
    for model in models:
        with contextlib.suppress(UserError):
            bases.setdefault(find_source(model, runtime).checkpoint, str(model.path))
    if len(bases) > 1:
        (one, first), (two, second) = list(bases.items())[:2]
        raise UserError(
            f"{first} is an adapter of {one}, and {second} of {two}: one run loads one base, so name the adapters of "
            "one, or say with --model.base which it is."
        )


def digests(adapter: Path) -> dict[str, str]:
    """Return what tells an adapter's files from others."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: sha256_of(adapter / name) for name in names if (adapter / name).is_file()}


def finished_report(run_dir: Path, settings: Settings, counts: Callable[[str], bool]) -> dict[str, Any]:
    """Return the report of a finished repair.

    Args:
        settings: of the adapter's own run, as it would be begun now
        counts: whether a setting must be the same, by its full name

    Raises:
        UserError: it is of another adapter, or of this one before it changed, or was made with other settings
    """
    place, before = Path(str(settings.model.path)), same.read(run_dir / SETTINGS)
    known = read_json(run_dir / OF) if (run_dir / OF).is_file() else None
    if known != digests(place):
        raise UserError(
            f"{run_dir} holds the repair of another adapter than {place} now is: remove that folder, or give another "
            "--out."
        )
    before = {**before, "model": {**(before.get("model") or {}), "path": settings.model.path}}  # however it is spelled
    other = same.differences(before, settings, counts)
    if other:
        raise UserError(f"{run_dir} was repaired with other settings ({'; '.join(other)}): give another --out.")
    (run,) = read_runs([run_dir])
    return run.report
