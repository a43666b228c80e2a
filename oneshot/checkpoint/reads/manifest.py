"""The manifest of what oneshot writes: sizes of the files, and checksums of the tensors in pieces of 16 MiB at most.

A piece lies in what one rank wrote. Whoever reads checks it, on any number of ranks: every piece once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from oneshot.checkpoint.disk.files import MANIFEST, TensorEntry, list_tensors, read_json
from oneshot.checkpoint.disk.folders import naming
from oneshot.checkpoint.disk.seal import CONFIGS, check_sealed
from oneshot.checkpoint.layout import ITEM_SIZES, tensor_bytes
from oneshot.checkpoint.reads.ranges import CHUNK, Piece, piece_read, read_all
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError

Pieces = dict[str, list[Piece]]  # tensor -> its pieces, in order
HASH = "xxh3_64"


def write_manifest(folder: Path, written: list[Pieces], facts: dict[str, Any]) -> None:
    """Write the sizes of the folder's safetensors files and the pieces that each rank wrote, with further facts."""
    by_tensor: Pieces = {}
    for rank in written:
        for name, pieces in rank.items():
            by_tensor.setdefault(name, []).extend(pieces)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    with naming(folder / MANIFEST):
        ordered = {name: sorted(found) for name, found in by_tensor.items()}
        text = json.dumps({**facts, "hash": HASH, "files": sizes, "pieces": ordered})
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_pieces(folder: Path, tensors: dict[str, TensorEntry]) -> Pieces:
    """Return the pieces that a folder's manifest lists, or nothing where it has no manifest of ours.

    Raises:
        UserError: the manifest does not fit the folder: other files or sizes, other tensors, pieces with gaps
    """
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"files", "pieces"} & manifest.keys():
        return {}  # another program's file of this common name
    problem = _misfit(folder, tensors, manifest)
    if problem:
        raise UserError(
            f"{folder / MANIFEST} does not fit the files beside it: {problem}; copy the checkpoint again, or remove "
            "the manifest if you changed the files yourself."
        )
    check_sealed(folder, CONFIGS)
    return {name: [(*piece,) for piece in found] for name, found in manifest["pieces"].items()}


def _misfit(folder: Path, tensors: dict[str, TensorEntry], manifest: dict[str, Any]) -> str:
    """What of the manifest does not fit the folder; nothing if all does."""
    files, pieces = manifest.get("files"), manifest.get("pieces")
    if manifest.get("hash") != HASH or not isinstance(files, dict) or not isinstance(pieces, dict):
        return f"it is not of this version, which lists files and pieces with {HASH}"
    for file, size in files.items():
        path = folder / file
        if Path(file).name != file:
            return f"it names the file {file}, which is not in this folder"
        found = path.stat().st_size if os.path.isfile(path) else None  # false for a name with NUL in it
        if found != size:
            return f"{file} is missing" if found is None else f"{file} has {found} bytes, the manifest says {size}"
    for name in sorted(tensors.keys() ^ pieces.keys()):
        if name in pieces or 0 not in tensors[name].shape:  # an empty tensor has no piece
            return f"{name} is in {'the manifest' if name in pieces else 'the shards'} only"
    for name, found in pieces.items():
        if tensors[name].shard.name not in files:
            return f"it does not list {tensors[name].shard.name}"
        if not _covers(found, tensors[name]):
            return f"its pieces are not the whole of {name}"
    return ""


def _covers(pieces: Any, entry: TensorEntry) -> bool:
    """Whether the pieces are well formed, and follow one another from the tensor's first element to its last."""
    end, most = 0, CHUNK // ITEM_SIZES[entry.dtype]
    for piece in pieces if isinstance(pieces, list) else []:
        if not (isinstance(piece, list) and [type(part) for part in piece] == [int, int, str]):
            return False
        if piece[0] != end or not end < piece[1] <= end + most:
            return False
        end = piece[1]
    return end * ITEM_SIZES[entry.dtype] == tensor_bytes(entry.shape, entry.dtype)


def check_share(runtime: Runtime, folder: Path) -> None:
    """Compare a folder's bytes with its manifest, where it has one: each rank a share, together all of it. Collective.

    Raises:
        UserError: on every rank, naming file and tensor, if a byte is not what was written; or as ``read_pieces``
    """
    with agree(runtime, f"checking {folder}"):
        tensors = list_tensors(folder)
        pieces = read_pieces(folder, tensors)
        # in the order of the files, so that each rank reads on from where it was
        order = sorted(pieces, key=lambda name: (tensors[name].shard, tensors[name].offset))
        every = [(name, piece) for name in order for piece in pieces[name]]
        first, last = (len(every) * rank // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
        read_all(piece_read(tensors[name], piece, name) for name, piece in every[first:last])
