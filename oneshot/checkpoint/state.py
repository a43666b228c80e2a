"""The training state on disk: enough to go on as if nothing had happened, on any number of ranks and any sharding.

``state/step-N/`` holds the fp32 masters and Adam's moments as whole tensors in safetensors shards, to which every rank
writes its pieces, and ``manifest.json``. A rank that resumes reads the ranges that it now owns, whoever wrote them.
Learning rate and data order are functions of the step; random number generators are kept per rank.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.files import MANIFEST, TensorEntry, list_tensors, read_json
from oneshot.checkpoint.folders import OLD, PARTIAL, clean, naming, replacing
from oneshot.checkpoint.layout import Range, partition
from oneshot.checkpoint.ranges import range_checksum, read_range
from oneshot.checkpoint.write import (
    MAX_SHARD_BYTES,
    Slot,
    Written,
    create_shards,
    opened_shards,
    plan_shards,
    write_manifest,
    write_range,
)
from oneshot.distributed.engine import TrainingEngine
from oneshot.distributed.optimizer_state import Piece, allocate, pieces, restored, trained_shapes
from oneshot.distributed.runtime import Runtime, agree, barrier, gather_objects
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

SCHEMA = 1
_STEP = re.compile(rf"step-(\d+)(?:{re.escape(PARTIAL)}|{re.escape(OLD)})?")


def save_state(engine: TrainingEngine, folder: Path, step: int, keep: int) -> Path:
    """Write ``folder/step-N`` and remove all but the last ``keep`` states. Collective.

    Args:
        folder: the run's ``state`` folder
        step: optimizer steps done

    Raises:
        UserError: on every rank, if any rank could not write; older states are still there
    """
    runtime = engine.runtime
    allocate(engine)
    shapes = trained_shapes(engine)
    slots, headers = plan_shards(shapes, dict.fromkeys(shapes, "F32"), MAX_SHARD_BYTES)
    target = folder / f"step-{step}"
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(runtime, target) as temporary:
        with agree(runtime, f"creating the training state {target}"):
            if runtime.is_main:
                create_shards(temporary, slots, headers)
        with agree(runtime, f"writing the training state {target}"):
            written = _write_pieces(engine, temporary, slots)
            _write_random_state(temporary / _random_name(runtime.rank))
        everything = gather_objects(runtime, written)
        with agree(runtime, f"finishing the training state {target}"):
            if runtime.is_main:
                facts = {"step": step, "world_size": runtime.world_size, "sharding": runtime.sharding}
                write_manifest(temporary, everything, {"schema": SCHEMA, **facts})
    if runtime.is_main:
        for old in _states(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(runtime)
    return target


def latest_state(runtime: Runtime, folder: Path) -> Path | None:
    """Return the newest whole state of a run's ``state`` folder, or none; rank 0 looks. Collective."""
    states = _states(folder) if runtime.is_main else []
    newest = gather_objects(runtime, str(states[-1]) if states else "")[0]
    return Path(newest) if newest else None


def load_state(engine: TrainingEngine, state: Path) -> int:
    """Restore the engine from a state written by any number of ranks under any sharding; returns its step. Collective.

    Raises:
        UserError: the state belongs to another model, or a shard is missing, cut off or altered
    """
    runtime = engine.runtime
    manifest = read_json(state / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{state / MANIFEST} is not a training state of this version: start the fine-tune anew.")
    with agree(runtime, f"reading the training state {state}"):
        tensors = list_tensors(state)
        shapes = trained_shapes(engine)
        wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
        if wrong or len(tensors) != len(shapes):
            odd = wrong or sorted(set(tensors) - set(shapes))
            raise UserError(f"{state} belongs to another model or method: {odd[0]} does not fit.")
        _check_share(runtime, state, tensors, manifest)
        allocate(engine)
        for piece in pieces(engine):
            own = Range(piece.start, piece.start + len(piece.values), len(piece.values))
            name = f"{piece.kind}.{piece.name}"
            read_range(tensors[name], own, piece.values, name)
    restored(engine, manifest["step"])
    random_state = state / _random_name(runtime.rank)
    if manifest["world_size"] == runtime.world_size and random_state.is_file():
        _read_random_state(random_state)
    return int(manifest["step"])


def _write_pieces(engine: TrainingEngine, folder: Path, slots: dict[str, Slot]) -> Written:
    """Write what this rank has to write; returns tensor -> (start, stop, CRC-32 of the bytes)."""
    written: Written = {}
    with opened_shards(folder, slots) as descriptors:
        for piece in pieces(engine):
            name = f"{piece.kind}.{piece.name}"
            own, values = _share(engine.runtime, piece)
            with naming(folder / slots[name].shard):
                checksum = write_range(descriptors[slots[name].shard], slots[name], own, values)
            written[name] = (own.start, own.stop, checksum)
    return written


def _share(runtime: Runtime, piece: Piece) -> tuple[Range, torch.Tensor]:
    """The part of a piece that this rank writes: all of it if sharded, its share if every rank holds the whole."""
    if runtime.sharding in ("zero2", "zero3"):
        return Range(piece.start, piece.start + len(piece.values), len(piece.values)), piece.values
    own = partition(piece.shape, runtime.rank, runtime.world_size)
    return own, piece.values[own.start : own.stop]


def _check_share(runtime: Runtime, state: Path, tensors: dict[str, TensorEntry], manifest: dict[str, Any]) -> None:
    """Compare this rank's share of the pieces with their checksums; together the ranks read everything once."""
    every = [(name, piece) for name, found in sorted(manifest["pieces"].items()) for piece in found]
    for name, (start, stop, checksum) in every[runtime.rank :: runtime.world_size]:
        if range_checksum(tensors[name], start, stop, name) != checksum:
            raise UserError(
                f"{tensors[name].shard} was altered: {name} does not have the checksum that {MANIFEST} gives; "
                f"remove {state} to resume from an older state."
            )


def _states(folder: Path) -> list[Path]:
    """Whole states, oldest first; what interrupted saves left is cleaned up on the way."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = sorted({int(match[1]) for name in names if (match := _STEP.fullmatch(name))})
    for number in numbers:
        clean(folder / f"step-{number}")
    return [folder / f"step-{n}" for n in numbers if (folder / f"step-{n}" / MANIFEST).is_file()]


def _random_name(rank: int) -> str:
    return f"random-rank{rank}.safetensors"


def _write_random_state(path: Path) -> None:
    """This rank's generators of torch."""
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, path)


def _read_random_state(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
