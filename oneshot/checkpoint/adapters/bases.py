"""What an adapter stands on: the checkpoint that is asked for, else the one that its config names; its tokenizer."""

from __future__ import annotations

from pathlib import Path

from oneshot.checkpoint.disk.files import resolve
from oneshot.checkpoint.names import ADAPTER_CONFIG
from oneshot.errors import UserError
from oneshot.reading import read_object


def base_of(adapter: Path, asked: str | None, revision: str | None = None) -> tuple[str, Path]:
    """Return name and folder of the checkpoint that an adapter stands on, see ``named_base``."""
    name, wanted, named_by = named_base(adapter, asked, revision)
    return name, resolve(name, "base model", revision=wanted, named_by=named_by)


def named_base(adapter: Path, asked: str | None, revision: str | None) -> tuple[str, str | None, Path | None]:
    """Return the base of an adapter, its revision, and the file that names it: what is asked for, else the config's.

    Raises:
        UserError: the config names none, or a revision that is no text
    """
    if asked:
        return asked, revision, None
    path = adapter / ADAPTER_CONFIG
    fields = read_object(path)
    name, own = fields.get("base_model_name_or_path"), fields.get("revision")
    if not name or not isinstance(name, str):
        raise UserError(f"{path} names no base model: give it with --model.base.")
    if own is not None and not isinstance(own, str):
        raise UserError(f"{path} has the revision {own!r}, which is no text: restore it from its source.")
    return name, revision or own, path


def own_tokenizer(adapter: Path) -> Path | None:
    """Return the folder of an adapter if it holds a tokenizer, which then takes the place of its base's; else none."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else None
