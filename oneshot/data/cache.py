"""Tensors kept on disk between runs: a file that is missing, cut off or altered is passed over and made again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def folder_of(kind: str) -> Path:
    """Return the user's folder for one kind of cached things: ``$XDG_CACHE_HOME/oneshot/KIND``, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "oneshot" / kind


def read_cached(path: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a cached file, on the CPU; none where it is missing, cut off or altered."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return tensors if checksum == _checksum(tensors) else None


def write_cached(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put tensors into the cache, as ``put`` does."""
    from safetensors.torch import save

    put(save(tensors, metadata={"sha256": _checksum(tensors)}), path)


def put(content: bytes, path: Path) -> None:
    """Put a file into the cache, by one rename; a cache that cannot be written is no reason to stop a run.

    File and folder are the user's alone: what is cached of prompts can be read from them.
    """
    temporary = None
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\0".encode())
        raw = tensors[name].contiguous().flatten().view(torch.uint8)  # NumPy knows no bf16
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
