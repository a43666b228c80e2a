"""Which checkpoint a patch belongs to: a small file in the patch's folder, and the check that a checkpoint is that one.

It holds a hash of the checkpoint's tensor list and hashes of a few bytes of a few tensors, those first that the patch
changes. None depends on how the checkpoint is cut into shards, and a checkpoint of any size is checked in a moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from oneshot.checkpoint.adapter import PREFIX
from oneshot.checkpoint.files import ADAPTER_TENSORS, TensorEntry, find_weight, list_tensors, read_header, read_json
from oneshot.checkpoint.layout import tensor_bytes
from oneshot.errors import UserError

IDENTITY = "oneshot_patch.json"
REPAIR, DERIVED, UPDATE = "repair", "derived", "update"
_SCHEMA = 1
_CHANGED, _OTHERS = 56, 8  # tensors sampled at most, of those that the patch changes and of the rest
_SAMPLE = 1024  # bytes taken from the start, the middle and the end of a sampled tensor


@dataclass(frozen=True)
class Identity:
    """What ``oneshot_patch.json`` says.

    Attributes:
        kind: repair (a safety repair, as it was written), derived (made of patches of which one is a repair) or update
            (any other low-rank update)
        base: name or folder of the checkpoint, for people
        tensors: SHA-256 of the sorted names, dtypes and shapes of its tensors
        changed: tensor that the patch changes -> SHA-256 of the bytes sampled from it
        others: the same of tensors that the patch leaves alone
    """

    kind: str
    base: str
    tensors: str
    changed: dict[str, str]
    others: dict[str, str]


def write_identity(folder: Path, checkpoint: Path, *, kind: str, base: str) -> None:
    """Write into a patch's folder which checkpoint it belongs to. On one rank only, after the patch itself.

    Args:
        folder: of the patch, with its ``adapter_model.safetensors``
        checkpoint: folder of the checkpoint that the patch is to be added to
        kind: repair or update
        base: the checkpoint's name as people know it
    """
    tensors = list_tensors(checkpoint)
    keys = read_header(folder / ADAPTER_TENSORS)
    modules = {key.split(".lora_")[0].removeprefix(PREFIX) for key in keys}
    patched = {name for module in modules if (name := find_weight(tensors, module)) is not None}
    changed, others = _spread(sorted(patched), _CHANGED), _spread(sorted(tensors.keys() - patched), _OTHERS)
    identity = Identity(
        kind=kind,
        base=base,
        tensors=_list_hash(tensors),
        changed={name: _sample(tensors[name], name) for name in changed},
        others={name: _sample(tensors[name], name) for name in others},
    )
    store_identity(folder, identity)


def store_identity(folder: Path, identity: Identity) -> None:
    """Write an identity, one that another patch has, into a patch's folder."""
    text = json.dumps({"schema": _SCHEMA, **asdict(identity)}, indent=2)
    (folder / IDENTITY).write_text(text + "\n", encoding="utf-8")


def read_identity(folder: Path) -> Identity | None:
    """Return what a patch says that it belongs to; none for an adapter without that file.

    Raises:
        UserError: the file is not one of ours
    """
    if not (folder / IDENTITY).is_file():
        return None
    fields = read_json(folder / IDENTITY)
    kinds = {"kind": str, "base": str, "tensors": str, "changed": dict, "others": dict}
    if (
        not isinstance(fields, dict)
        or fields.get("schema") != _SCHEMA
        or any(not isinstance(fields.get(name), kind) for name, kind in kinds.items())
    ):
        raise UserError(
            f"{folder / IDENTITY} is not what this version of oneshot writes: restore it, or remove it to use the "
            "patch unchecked."
        )
    return Identity(**{name: fields[name] for name in kinds})


def check_identity(folder: Path, checkpoint: Path, *, applied: bool = False) -> Identity | None:
    """Check that a patch belongs to a checkpoint, and return what it says; none where it says nothing.

    Args:
        applied: the checkpoint is to be one into which the patch was merged

    Raises:
        UserError: it belongs to another checkpoint; the first tensor that differs is named. Or ``applied``, and the
            checkpoint is the one from before the merge
    """
    identity = read_identity(folder)
    if identity is None:
        return None
    tensors = list_tensors(checkpoint)
    problem = _misfit(identity, tensors, applied=applied)
    if problem:
        raise UserError(
            f"The patch {folder} belongs to another model ({identity.base}): in {checkpoint}, {problem}; give the "
            "model that it was made for, or --force to use it anyway."
        )
    if applied and all(_sample(tensors[name], name) == digest for name, digest in identity.changed.items()):
        raise UserError(
            f"{checkpoint} is the model that the patch {folder} was made for, and not one with the patch in it: there "
            "is nothing to subtract it from; give the merged model, or --force."
        )
    return identity


def fingerprint(tensors: dict[str, TensorEntry]) -> str:
    """Return a hash that tells a checkpoint from others: of its tensor list, and of bytes of a few tensors."""
    digest = hashlib.sha256(_list_hash(tensors).encode())
    for name in _spread(sorted(tensors), _CHANGED + _OTHERS):
        digest.update(_sample(tensors[name], name).encode())
    return digest.hexdigest()


def _misfit(identity: Identity, tensors: dict[str, TensorEntry], *, applied: bool) -> str:
    sampled = {**identity.changed, **identity.others}
    missing = sorted(sampled.keys() - tensors.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, digest in (identity.others if applied else sampled).items():
        if _sample(tensors[name], name) != digest:
            return f"{name} holds other values"
    if _list_hash(tensors) != identity.tensors:
        return "the list of tensors (their names, dtypes and shapes) is another"
    return ""


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced."""
    return [names[len(names) * i // min(most, len(names))] for i in range(min(most, len(names)))]


def _list_hash(tensors: dict[str, TensorEntry]) -> str:
    rows = [[name, entry.dtype, list(entry.shape)] for name, entry in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _sample(entry: TensorEntry, name: str) -> str:
    """The SHA-256 of a tensor's dtype, shape, and bytes at its start, middle and end."""
    size = tensor_bytes(entry.shape, entry.dtype)
    digest = hashlib.sha256(json.dumps([entry.dtype, list(entry.shape)]).encode())
    descriptor = os.open(entry.shard, os.O_RDONLY)
    try:
        for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
            wanted = min(_SAMPLE, size - start)
            found = os.pread(descriptor, wanted, entry.offset + start)
            if len(found) != wanted:
                raise UserError(f"{entry.shard} ended in the middle of {name}: the file was cut off, copy it again.")
            digest.update(found)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def same_base(identities: list[tuple[Path, Identity | None]]) -> Identity | None:
    """Return the identity of what is made of patches: that of the first which has one; derived if one is a repair.

    Raises:
        UserError: two of them belong to different checkpoints
    """
    known = [(folder, identity) for folder, identity in identities if identity is not None]
    if not known:
        return None
    first_folder, first = known[0]
    sampled = {**first.changed, **first.others}
    for folder, identity in known[1:]:
        theirs = {**identity.changed, **identity.others}
        if first.tensors != identity.tensors or any(sampled[n] != theirs[n] for n in sampled.keys() & theirs.keys()):
            raise UserError(
                f"The patches {first_folder} and {folder} belong to different models ({first.base} and "
                f"{identity.base}): their sum fits neither; --force sums them anyway."
            )
    repair = any(identity.kind != UPDATE for _, identity in known)
    return Identity(DERIVED if repair else UPDATE, first.base, first.tensors, first.changed, first.others)
