"""Is a checkpoint or training state whole? Every byte is read once, 16 MiB at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.effective import kinds_of, read_effective
from oneshot.checkpoint.disk.files import (
    ADAPTER_TENSORS,
    TensorEntry,
    is_adapter,
    list_tensors,
    read_header,
    weights_file,
)
from oneshot.checkpoint.disk.folders import refuse_half
from oneshot.checkpoint.disk.seal import check_sealed
from oneshot.checkpoint.layout import FLOATS, ITEM_SIZES, Range, tensor_bytes
from oneshot.checkpoint.loading.configs import read_config, read_generation_config, read_tokenizer
from oneshot.checkpoint.names import CONFIG, INDEX, SINGLE
from oneshot.checkpoint.reads.manifest import read_pieces
from oneshot.checkpoint.reads.ranges import CHUNK, Piece, piece_read, read_all, read_range, torch_dtype
from oneshot.checkpoint.writing.standing import VERDICT, changed_since
from oneshot.data.encoding import encode_prompt
from oneshot.errors import UserError
from oneshot.reading import sha256_of

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_BLOB = re.compile(r"[0-9a-f]{64}")  # the name of a large file in the Hub's cache is its SHA-256


@dataclass
class Shard:
    """What was found in one shard file: its tensors, their bytes and dtypes, and what is wrong with it."""

    name: str
    tensors: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def check_shards(folder: Path) -> list[Shard]:
    """Check every tensor of a checkpoint, adapter or training state: not empty, finite, and with its checksums.

    Checksums come from the manifest of what oneshot wrote and, for files in the Hub's cache, from their names there;
    of other files none are known.

    Raises:
        UserError: a shard is missing or cut off, the index or the manifest does not fit the shards, or a killed run has
            left half a folder
    """
    refuse_half(folder)
    check_sealed(folder)
    tensors = tensors_of(folder)
    pieces = read_pieces(folder, tensors)
    shards: dict[str, Shard] = {}
    for name, entry in tensors.items():
        shard = shards.setdefault(entry.shard.name, Shard(entry.shard.name))
        shard.tensors += 1
        shard.bytes += tensor_bytes(entry.shape, entry.dtype)
        shard.dtypes.add(entry.dtype)
        shard.problems += [f"{name} {problem}" for problem in _problems(entry, name, pieces.get(name, []))]
    for path in sorted(folder.iterdir()):
        if path.name == INDEX and not is_adapter(folder) and weights_file(folder) != INDEX:
            left = f"is not read, as {SINGLE} lies beside it; servers may read both: remove it and its shards"
            shards[INDEX] = Shard(INDEX, problems=[left])
        if _is_altered_blob(path):
            shard = shards.setdefault(path.name, Shard(path.name))
            shard.problems.append("does not have the SHA-256 that the Hub's cache gives: remove it, download it again")
    if other := changed_since(folder):
        shards[VERDICT] = Shard(VERDICT, problems=[f"is about other weights: {other}"])
    if (beside := _check_beside(folder)) is not None:
        shards[beside.name] = beside
    return list(shards.values())


def _check_beside(folder: Path) -> Shard | None:
    """What is wrong with a checkpoint's config and tokenizer, or an adapter's tokenizer; none where there is none."""
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
    if not has_tokenizer and not (folder / CONFIG).is_file():
        return None
    found = Shard("config and tokenizer" if (folder / CONFIG).is_file() else "tokenizer")
    checks: list[Callable[[], object]] = []
    if (folder / CONFIG).is_file():
        checks += [lambda: read_config(folder), lambda: read_generation_config(folder)]
    if has_tokenizer:
        checks.append(lambda: _render_something(folder))
    elif not is_adapter(folder):
        found.problems.append("there is no tokenizer beside the weights: copy it from where they come from")
    for check in checks:
        try:
            check()
        except UserError as error:
            found.problems.append(str(error))
    return found


def _render_something(folder: Path) -> None:
    """Raise UserError unless the tokenizer can be read and its chat template takes a question."""
    encode_prompt([{"role": "user", "content": "Hello?"}], read_tokenizer(folder))


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint, adapter or training state, by its name in the files.

    Raises:
        UserError: a shard is missing or cut off, the index does not fit the shards, or an adapter is none of PEFT's
    """
    if is_adapter(folder):
        kinds = kinds_of(folder)
        if not kinds.every:
            read_adapter(folder)
        elif not kinds.by_peft:
            read_effective(folder)
        return read_header(folder / ADAPTER_TENSORS)
    return list_tensors(folder)


def _problems(entry: TensorEntry, name: str, pieces: list[Piece]) -> Iterator[str]:
    import torch

    total, bad = math.prod(entry.shape), 0
    if total == 0:
        yield "is empty"
    step = CHUNK // ITEM_SIZES[entry.dtype]
    unchecked = [(start, min(start + step, total), "") for start in range(0, total, step)]
    for piece in pieces or unchecked:
        start, stop, checksum = piece
        try:
            if entry.dtype in FLOATS:
                part = torch.empty(stop - start, dtype=torch_dtype(entry, name))
                read_range(entry, Range(start, stop, stop - start), part, name, [piece] if checksum else [])
                bad += int((~part.isfinite()).sum())
            elif checksum:
                read_all([piece_read(entry, piece, name)])
        except UserError:
            yield f"does not have its checksum in elements {start} to {stop}"
    if bad:
        yield f"holds {bad} values that are not finite"


def _is_altered_blob(path: Path) -> bool:
    """Whether a file is a link into the Hub's cache, to one that no longer has the hash that it is named by."""
    if not path.is_symlink():
        return False
    blob = Path(os.readlink(path))
    if blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
        return False
    return sha256_of(path) != blob.name
