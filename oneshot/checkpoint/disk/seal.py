"""The last thing done to a folder before others see it, and what readers compare: its small files' SHA-256.

A folder is sealed by whoever wrote it, when all is in it: keys and tokens are struck out of its JSON files, everybody
may read it whom the umask lets, and the checksums of its config, tokenizer, chat template, index and adapter go into
``manifest.json``, of a patch into ``oneshot_patch.json``. The card and the marker are left out: they may be edited.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from oneshot.checkpoint.names import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    CARD,
    CONFIG,
    EXPORT,
    GENERATION,
    IDENTITY,
    INDEX,
    MANIFEST,
    MARKER,
    TOKENIZER,
)
from oneshot.errors import UserError
from oneshot.reading import digest_of, read_json, reading, sha256_of
from oneshot.redact import redacted, without_secrets
from oneshot.whole import readable

CONFIGS = (CONFIG, GENERATION, INDEX)
ADAPTER = (ADAPTER_CONFIG, ADAPTER_TENSORS)
RANDOM = ("random-rank*.safetensors",)  # generators' states, in a training state
SEALED = (*CONFIGS, *ADAPTER, *TOKENIZER, *RANDOM)
_FIELD = "sha256"
_WITH_NAMES = (ADAPTER_CONFIG, CONFIG, GENERATION, "tokenizer_config.json", MARKER, IDENTITY, EXPORT)
# the checksums themselves, and where an adapter's base is: its users move it, and say so there
_NOT_TOLD = (_FIELD, "base_model_name_or_path", "revision")


def seal(folder: Path) -> None:
    """Strike out secrets, open the files to whom the umask lets, and note the checksums. On one rank, at the end."""
    for name in _WITH_NAMES:
        if (folder / name).is_file():
            _strike(folder / name)
    if (folder / CARD).is_file():  # PEFT's names the base
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        if (plain := redacted(text)) != text:
            (folder / CARD).write_text(plain, encoding="utf-8")
    found = digests(folder)
    holder = folder / (IDENTITY if (folder / IDENTITY).is_file() else MANIFEST)
    facts = read_json(holder) if holder.is_file() else {}
    if isinstance(facts, dict) and (found or facts):
        found[holder.name] = _digest_of(facts)
        holder.write_text(json.dumps({**facts, _FIELD: found}) + "\n", encoding="utf-8")
    readable(folder)  # safetensors makes its files private


def digests(folder: Path, patterns: Iterable[str] = SEALED) -> dict[str, str]:
    """Return the SHA-256 of the files of a folder whose names match, by name, as of ``file_digest``."""
    wanted = tuple(patterns)
    return {
        path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and _is(path.name, wanted)
    }


def check_sealed(folder: Path, patterns: Iterable[str] = SEALED) -> None:
    """Compare a folder's small files with the checksums that it was sealed with, where it was.

    Args:
        patterns: of the names of the files to compare; what holds the checksums is compared with its own in any case

    Raises:
        UserError: one is missing or is not what was written
    """
    holder = next((folder / name for name in (IDENTITY, MANIFEST) if (folder / name).is_file()), None)
    facts: Any = read_json(holder) if holder else None
    noted = facts.get(_FIELD) if isinstance(facts, dict) else None
    if holder is None or noted is None:
        return
    if not isinstance(noted, dict) or any(Path(name).name != name for name in noted):
        raise UserError(f"{holder} names files that are not in this folder: restore it from its source.")
    wanted = tuple(patterns)
    for name, digest in noted.items():
        if name == holder.name:
            found: str | None = _digest_of(facts)
        else:
            found = file_digest(folder / name) if _is(name, wanted) else None
        if found not in (None, digest):
            raise UserError(
                f"{folder / name} is not the file that was written (its SHA-256 is another than {holder.name} says): "
                f"copy it again, or, if you changed it yourself, remove {_FIELD} from {holder.name}."
            )


def _strike(path: Path) -> None:
    with reading(path):
        fields = read_json(path)
    if (plain := without_secrets(fields)) != fields:
        path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _digest_of(fields: dict[str, Any]) -> str:
    """The SHA-256 of what a JSON file says: of the checksums' own holder and of adapters' configs."""
    told = {key: value for key, value in fields.items() if key not in _NOT_TOLD}
    return digest_of(told)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; of an adapter's config that of what it says, its base's place left out."""
    if path.name == ADAPTER_CONFIG and isinstance(fields := read_json(path), dict):
        return _digest_of(fields)
    with reading(path):
        return sha256_of(path)
