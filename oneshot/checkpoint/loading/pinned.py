"""Which commit of a Hub repository a run is of: looked up once, and from then on part of its settings.

A branch may move while a run waits, resumes or is repeated; its settings then name the commit that was taken.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from oneshot.checkpoint.adapters.bases import named_base
from oneshot.checkpoint.disk.files import is_adapter, local_folder, remember, resolve
from oneshot.errors import UserError
from oneshot.settings import Settings


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder of the Hub's cache; none for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None


def pinned(settings: Settings) -> Settings:
    """Return the settings with the commit of every Hub id among model, base and reference as its revision.

    Raises:
        UserError: one is not to be had; or a revision is given for a folder, or for nothing
    """
    model = settings.model
    if model.path is None:
        return settings
    folder, commit = _fetched(model.path, "model", model.revision, "model.revision")
    base_revision = model.base_revision
    if is_adapter(folder):
        name, wanted, by = named_base(folder, model.base, base_revision)
        if base_revision or not local_folder(name):
            _, base_revision = _fetched(
                name, "base model", wanted, "model.base_revision", None if base_revision else by
            )
    elif base_revision and local_folder(model.path):
        raise UserError(
            f"Setting model.base_revision is given, and {model.path} is no adapter that stands on a base: leave it out."
        )
    reference_revision = settings.reference_revision
    if settings.reference:
        _, reference_revision = _fetched(settings.reference, "reference", reference_revision, "reference_revision")
    elif reference_revision:
        raise UserError("Setting reference_revision is given, but no reference: give it with --reference.")
    return dataclasses.replace(
        settings,
        reference_revision=reference_revision,
        model=dataclasses.replace(model, revision=commit, base_revision=base_revision),
    )


def _fetched(
    name: str, what: str, revision: str | None, setting: str, named_by: Path | None = None
) -> tuple[Path, str | None]:
    """The folder of a Hub id, and its commit; of a folder here itself, which has no revision."""
    if local_folder(name):
        if revision and named_by is None:
            raise UserError(f"Setting {setting} is given, but {name} is a folder here: leave it out, or give a Hub id.")
        return resolve(name, what), None
    folder = resolve(name, what, revision=revision, named_by=named_by)
    commit = commit_of(folder)
    if commit is not None:
        remember(name, commit, folder)
    return folder, commit or revision
