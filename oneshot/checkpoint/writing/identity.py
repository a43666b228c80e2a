"""Which checkpoint a patch belongs to: a small file in the patch's folder, and the check that a checkpoint is that one.

It holds a hash of the checkpoint's tensor list and a digest of every tensor. None depends on how the checkpoint is cut
into shards; where a manifest has the checksums, or the cache the digests, no weight is read. Patches of before have
hashes of a few bytes of a few tensors, and are checked by these.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.adapter import PREFIX, read_adapter
from oneshot.checkpoint.adapters.carrier import expert_of, is_experts
from oneshot.checkpoint.disk.files import (
    ADAPTER_TENSORS,
    TensorEntry,
    list_tensors,
    read_header,
    read_json,
)
from oneshot.checkpoint.layout import tensor_bytes
from oneshot.checkpoint.names import IDENTITY as IDENTITY
from oneshot.checkpoint.reads.digests import list_hash, tensor_digests
from oneshot.checkpoint.writing.merge_experts import stored_tensors
from oneshot.errors import UserError
from oneshot.redact import redacted

REPAIR, DERIVED, UPDATE = "repair", "derived", "update"
_SAMPLED, _SCHEMA = 1, 2  # that of before, which sampled bytes of some tensors, and today's
_SAMPLE = 1024  # bytes taken from the start, the middle and the end of a sampled tensor


@dataclass(frozen=True)
class Identity:
    """What ``oneshot_patch.json`` says.

    Attributes:
        kind: repair (a safety repair, as it was written), derived (made of patches of which one is a repair) or update
            (any other low-rank update)
        base: name or folder of the checkpoint, for people
        tensors: SHA-256 of the sorted names, dtypes and shapes of its tensors
        changed: tensor that the patch changes -> its digest; of a patch of before, SHA-256 of bytes sampled from some
        others: the same of tensors that the patch leaves alone
        schema: which of the two
    """

    kind: str
    base: str
    tensors: str
    changed: dict[str, str]
    others: dict[str, str]
    schema: int = _SCHEMA


def write_identity(folder: Path, checkpoint: Path, *, kind: str, base: str, model: Any = None) -> None:
    """Write into a patch's folder which checkpoint it belongs to. On one rank only, after the patch itself.

    Args:
        folder: of the patch, with its ``adapter_model.safetensors``
        checkpoint: folder of the checkpoint that the patch is to be added to
        kind: repair or update
        base: the checkpoint's name as people know it
        model: the checkpoint's, on any device; needed where the patch changes experts or routers
    """
    tensors = list_tensors(checkpoint)
    modules = {key.split(".lora_")[0].removeprefix(PREFIX) for key in read_header(folder / ADAPTER_TENSORS)}
    experts = {module for module in modules if is_experts(module)}
    names = modules - experts
    if experts:
        names |= {name for name in read_adapter(folder).update if expert_of(name)}
    patched = stored_tensors(checkpoint, model, names)
    digests = tensor_digests(checkpoint)
    identity = Identity(
        kind=kind,
        base=redacted(base),
        tensors=list_hash(tensors),
        changed={name: digests[name] for name in sorted(patched)},
        others={name: digests[name] for name in sorted(tensors.keys() - patched)},
    )
    store_identity(folder, identity)


def store_identity(folder: Path, identity: Identity) -> None:
    """Write an identity, one that another patch has, into a patch's folder."""
    text = json.dumps(asdict(identity), indent=2)
    (folder / IDENTITY).write_text(text + "\n", encoding="utf-8")


def read_identity(folder: Path) -> Identity | None:
    """Return what a patch says that it belongs to; none for an adapter without that file.

    Raises:
        UserError: the file is not one of ours
    """
    if not (folder / IDENTITY).is_file():
        return None
    fields = read_json(folder / IDENTITY)
    kinds = {"kind": str, "base": str, "tensors": str, "changed": dict, "others": dict, "schema": int}
    if (
        not isinstance(fields, dict)
        or fields.get("schema") not in (_SAMPLED, _SCHEMA)
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
    digests = _digests(identity, checkpoint, tensors)
    problem = _misfit(identity, tensors, digests, applied=applied)
    if problem:
        raise UserError(
            f"The patch {folder} belongs to another model ({identity.base}): in {checkpoint}, {problem}; give the "
            "model that it was made for, or --force to use it anyway."
        )
    if applied and all(digests[name] == digest for name, digest in identity.changed.items()):
        raise UserError(
            f"{checkpoint} is the model that the patch {folder} was made for, and not one with the patch in it: there "
            "is nothing to subtract it from; give the merged model, or --force."
        )
    return identity


def _digests(identity: Identity, checkpoint: Path, tensors: dict[str, TensorEntry]) -> dict[str, str]:
    """The checkpoint's digests of the kind that the patch has, of the tensors that it names and that are there."""
    if identity.schema == _SCHEMA:
        return tensor_digests(checkpoint)
    return {name: _sample(tensors[name], name) for name in {**identity.changed, **identity.others} if name in tensors}


def _misfit(identity: Identity, tensors: dict[str, TensorEntry], digests: dict[str, str], *, applied: bool) -> str:
    sampled = {**identity.changed, **identity.others}
    missing = sorted(sampled.keys() - tensors.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, digest in (identity.others if applied else sampled).items():
        if digests[name] != digest:
            return f"{name} holds other values"
    if list_hash(tensors) != identity.tensors:
        return "the list of tensors (their names, dtypes and shapes) is another"
    return ""


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
        theirs = {**identity.changed, **identity.others} if identity.schema == first.schema else {}
        if first.tensors != identity.tensors or any(sampled[n] != theirs[n] for n in sampled.keys() & theirs.keys()):
            raise UserError(
                f"The patches {first_folder} and {folder} belong to different models ({first.base} and "
                f"{identity.base}): their sum fits neither; --force sums them anyway."
            )
    repair = any(identity.kind != UPDATE for _, identity in known)
    kind = DERIVED if repair else UPDATE
    return Identity(kind, first.base, first.tensors, first.changed, first.others, first.schema)
