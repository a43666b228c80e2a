"""The shape of a config's model: from the user's cache, or asked of transformers and remembered there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneshot import __version__
from oneshot.checkpoint.disk.files import TensorEntry
from oneshot.data.cache import folder_of, put
from oneshot.errors import UserError
from oneshot.planning.shapes import ModelShape, as_plain, from_plain
from oneshot.versions import package_version

_READER = Path(__file__).with_name("meta_model.py")  # what it says a model is may change between versions, too


def model_shape(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry] | None = None, remote: Path | None = None
) -> ModelShape:
    """Return the shape of the model that a config.json describes, as transformers builds it.

    Building takes seconds, most of them to import transformers. What was found is kept in the user's cache, by the
    config's fields and by versions, and read from there in no time; a cache that is damaged or cannot be written is
    passed over.

    Args:
        config: the fields of its config.json
        tensors: of the checkpoint's files, where they are there, to be compared with
        remote: the folder of a model that brings its own code, which is run; none: the model is transformers' own

    Raises:
        UserError: transformers cannot build it, or the files are of another model
    """
    fields = {key: value for key, value in config.items() if key[0] != "_" and key != "quantization_config"}
    path = None if remote else folder_of("shapes") / f"{_key(fields)}.json"
    found = _read(path) if path else None
    if found is None:
        from oneshot.planning.meta_model import built_shape

        found = built_shape(fields, remote)
        if path:
            plain = as_plain(found)
            put(json.dumps({"sha256": _checksum(plain), "shape": plain}).encode(), path)
    if tensors is not None and not config.get("quantization_config"):
        _compare(found, tensors)
    return found


def _key(fields: Mapping[str, Any]) -> str:
    reader = hashlib.sha256(_READER.read_bytes()).hexdigest()
    told = [fields, __version__, package_version("transformers"), reader]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> ModelShape | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return from_plain(held["shape"]) if held["sha256"] == _checksum(held["shape"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _compare(shape: ModelShape, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse files that cannot be of this model; loading looks at every name and shape, and passes over more."""
    stored = sum(math.prod(entry.shape) for name, entry in tensors.items() if "rotary_emb" not in name)
    if stored < shape.parameters:
        raise UserError(
            f"The config.json describes {shape.parameters:,} parameters, the safetensors files hold {stored:,}: "
            "they are not of one checkpoint, copy it again."
        )
