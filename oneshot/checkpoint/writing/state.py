"""The training state on disk: enough to go on as if nothing had happened, on any number of ranks and any sharding.

``state/step-N/`` holds the fp32 masters and Adam's moments as whole tensors in safetensors shards, to which every rank
writes its pieces, and ``manifest.json``. A rank that resumes reads the ranges that it now owns, whoever wrote them.
Learning rate and data order are functions of the step; random number generators are kept per rank.

A save does not wait for the disk: training goes on while the files are synced, and an older state is removed only when
a newer one is on the disk. What a power loss damages does not have its checksums, and an older state is taken.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oneshot.checkpoint.disk.files import MANIFEST, TensorEntry, list_tensors, read_header, read_json
from oneshot.checkpoint.disk.folders import clean_inside, naming, replacing, sync_entries, sync_folder
from oneshot.checkpoint.disk.seal import RANDOM, check_sealed
from oneshot.checkpoint.layout import Range, partition
from oneshot.checkpoint.reads.manifest import Pieces, check_share, write_manifest
from oneshot.checkpoint.reads.ranges import Read, read_all
from oneshot.checkpoint.writing.write import (
    Slot,
    create_shards,
    in_turn,
    opened_shards,
    plan_shards,
    shard_bytes,
    write_range,
)
from oneshot.distributed.engine import TrainingEngine
from oneshot.distributed.optimizer_state import StateShare, allocate, held_state, restored, trained_shapes
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.errors import UserError
from oneshot.reading import reading
from oneshot.shown import one_line

if TYPE_CHECKING:
    import torch

SCHEMA = 2
_STEP = re.compile(r"step-(\d+)")


@dataclass
class States:
    """The saved states of a run, of which the last ones are kept.

    Attributes:
        folder: the run's ``state`` folder
        keep: how many
        moments: how Adam's are written; in bf16 a state takes two thirds of the bytes, and resuming is not bit-equal
    """

    runtime: Runtime
    folder: Path
    keep: int
    moments: Literal["fp32", "bf16"] = "fp32"
    _syncing: tuple[int, Future[None]] | None = field(default=None, init=False)  # of which step

    def save(self, engine: TrainingEngine, step: int) -> Path:
        """Write ``folder/step-N``, whose files a thread syncs while training goes on. Collective.

        Args:
            step: optimizer steps done

        Raises:
            UserError: on every rank, if any rank could not write, or the last state did not get to the disk; older
                states are still there
        """
        self.finish()
        runtime, target = self.runtime, self.folder / f"step-{step}"
        allocate(engine)
        shapes = trained_shapes(engine)
        rest = {"fp32": "F32", "bf16": "BF16"}[self.moments]
        dtypes = {name: "F32" if name.startswith("master.") else rest for name in shapes}
        slots, headers = plan_shards(shapes, dtypes, shard_bytes(shapes, dtypes, runtime.world_size))
        with contextlib.ExitStack() as files:
            with replacing(runtime, target, sync=False) as temporary:
                with agree(runtime, f"creating the training state {target}"):
                    if runtime.is_main:
                        create_shards(temporary, slots, headers)
                with agree(runtime, f"writing the training state {target}"):
                    descriptors = files.enter_context(opened_shards(temporary, slots, sync=False))
                    written = _write_pieces(engine, temporary, slots, descriptors)
                    _write_random_state(temporary / _random_name(runtime.rank))
                everything = gather_objects(runtime, written)
                with agree(runtime, f"finishing the training state {target}"):
                    if runtime.is_main:
                        facts = {"step": step, "world_size": runtime.world_size, "sharding": runtime.sharding}
                        write_manifest(temporary, everything, {"schema": SCHEMA, **facts})
            # the descriptors that were written through: only these are sure to be told of an error of the disk
            opened = files.pop_all()
        thread = ThreadPoolExecutor(1, "sync")  # the interpreter waits for it at its end
        self._syncing = step, thread.submit(_sync_state, opened, descriptors, target, runtime.rank)
        thread.shutdown(wait=False)
        return target

    def finish(self) -> None:
        """Wait until the last state is on the disk, then remove older ones but the last ``keep`` in all. Collective.

        Raises:
            UserError: on every rank, if any rank's files did not get to the disk; older states are still there
        """
        if self._syncing is None:
            return
        (step, future), self._syncing = self._syncing, None
        with agree(self.runtime, f"syncing the training state {self.folder / f'step-{step}'}"):
            future.result()
        if self.runtime.is_main:
            states = _states(self.folder)
            # what lies ahead of the run was damaged, and the run resumed from before it
            ahead = [number for number in states if number > step]
            for number in [*[number for number in states if number <= step][: -self.keep], *ahead]:
                shutil.rmtree(states[number], ignore_errors=True)


def newest_whole(runtime: Runtime, folder: Path) -> Path | None:
    """Return the newest state of a run's ``state`` folder all of whose bytes are right; none if there is no state.

    What interrupted saves left is cleaned up on the way. Collective: the ranks share the reading.

    Raises:
        UserError: there are states, and none is whole
    """
    if runtime.is_main:
        clean_inside(folder)
    states = gather_objects(runtime, [str(path) for path in _states(folder).values()] if runtime.is_main else [])[0]
    problems = []
    for state in map(Path, reversed(states)):
        try:
            with agree(runtime, f"looking at {state}"):
                _read_manifest(state)
                random_state = state / _random_name(runtime.rank)
                if random_state.is_file():
                    read_header(random_state)
            check_share(runtime, state)
            return state
        except UserError as error:  # which every rank has
            problems.append(str(error))
            if runtime.is_main:
                print(f"Passed over {state}: {one_line(error)}", flush=True)
    if problems:
        raise UserError(f"No state in {folder} is whole, so there is nothing to resume from: {problems[0]}")
    return None


def load_state(engine: TrainingEngine, state: Path) -> int:
    """Restore the engine from a state written by any number of ranks under any sharding; returns its step. Collective.

    Args:
        state: whole, as ``newest_whole`` has found

    Raises:
        UserError: the state belongs to another model
    """
    runtime = engine.runtime
    with agree(runtime, f"reading the training state {state}"):
        manifest = _read_manifest(state)
        tensors = list_tensors(state)
        shapes = trained_shapes(engine)
        wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
        if wrong or len(tensors) != len(shapes):
            odd = wrong or sorted(set(tensors) - set(shapes))
            raise UserError(f"{state} belongs to another model or method: {odd[0]} does not fit.")
        allocate(engine)
        read_all(_wanted(tensors[f"{piece.kind}.{piece.name}"], piece) for piece in held_state(engine))
    restored(engine, manifest["step"])
    random_state = state / _random_name(runtime.rank)
    if manifest["world_size"] == runtime.world_size and random_state.is_file():
        _read_random_state(random_state)
    return int(manifest["step"])


def _wanted(entry: TensorEntry, piece: StateShare) -> Read:
    own = Range(piece.start, piece.start + len(piece.values), len(piece.values))
    return Read(entry, own, piece.values, f"{piece.kind}.{piece.name}")


def _write_pieces(engine: TrainingEngine, folder: Path, slots: dict[str, Slot], descriptors: dict[str, int]) -> Pieces:
    """Write what this rank has to write; returns the pieces with their checksums."""
    written: Pieces = {}
    held = {f"{piece.kind}.{piece.name}": piece for piece in held_state(engine)}
    for name in in_turn(engine.runtime, slots):
        if name not in held:  # under ZeRO-2 a rank holds no element of some
            continue
        own, values = _share(engine.runtime, held[name])
        shard = slots[name].shard
        with naming(folder / shard):
            written[name] = write_range(descriptors[shard], slots[name], own, values)
    return written


def _share(runtime: Runtime, piece: StateShare) -> tuple[Range, torch.Tensor]:
    """The part of a piece that this rank writes: all of it if sharded, its share if every rank holds the whole."""
    if runtime.sharding in ("zero2", "zero3"):
        return Range(piece.start, piece.start + len(piece.values), len(piece.values)), piece.values
    own = partition(piece.shape, runtime.rank, runtime.world_size)
    return own, piece.values[own.start : own.stop]


def _sync_state(opened: contextlib.ExitStack, descriptors: dict[str, int], target: Path, rank: int) -> None:
    """Have on the disk what this rank wrote, and on rank 0 everything else."""
    with opened:
        for shard, descriptor in descriptors.items():
            with naming(target / shard):
                os.fsync(descriptor)
    sync_entries(target / _random_name(rank))
    if rank == 0:
        sync_folder(target)
        sync_entries(target.parent)


def _read_manifest(state: Path) -> dict[str, Any]:
    """The manifest of a training state: with step and world_size, and whatever ``read_pieces`` checks."""
    manifest = read_json(state / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or "pieces" not in manifest:
        raise UserError(f"{state / MANIFEST} is not a training state of this version: start the fine-tune anew.")
    if not all(type(manifest.get(name)) is int for name in ("step", "world_size")):
        raise UserError(f"{state / MANIFEST} does not say which step it is of: remove {state}.")
    check_sealed(state, RANDOM)
    return manifest


def _states(folder: Path) -> dict[int, Path]:
    """The states by step, oldest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    found = {int(match[1]): path for path in paths if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _random_name(rank: int) -> str:
    return f"random-rank{rank}.safetensors"


def _write_random_state(path: Path) -> None:
    """This rank's generators of torch."""
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    with naming(path):
        save_file(states, path)


def _read_random_state(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    with reading(path, "remove this state"):
        states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
