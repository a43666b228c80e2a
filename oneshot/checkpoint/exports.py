"""What is checked before an export: the adapters, the folder to write, and what is safe to hand out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapter import Adapter, read_adapter, write_patch
from oneshot.checkpoint.files import MARKER, is_adapter, is_degraded, resolve
from oneshot.checkpoint.folders import naming, replacing
from oneshot.checkpoint.identity import REPAIR, Identity, check_identity, read_identity
from oneshot.checkpoint.update import Update
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter that the user named: its folder, what it holds, its weight in the sum, and what it belongs to."""

    folder: Path
    adapter: Adapter
    weight: float
    identity: Identity | None


@phase("read")
def read_given(sources: list[str], weights: list[float]) -> list[GivenAdapter]:
    """Read the adapters to export.

    Args:
        weights: one for each, or none

    Raises:
        UserError: one is no LoRA adapter, is marked as safety-degraded, or is not finite
    """
    found = []
    for source, weight in zip(sources, weights or [1.0] * len(sources)):
        folder = resolve(source, "adapter")
        if not is_adapter(folder):
            raise UserError(f"{folder} holds no adapter_config.json: give the folder of a PEFT LoRA adapter.")
        refuse_degraded(folder)
        adapter = read_adapter(folder)
        for module, factors in adapter.stored.items():
            if not (factors.b.isfinite().all() and factors.a.isfinite().all()):
                raise UserError(f"The adapter {folder} holds NaN or infinity in {module}: train or save it again.")
        found.append(GivenAdapter(folder, adapter, weight, read_identity(folder)))
    return found


def refuse_degraded(folder: Path) -> None:
    """Raise UserError for a checkpoint or adapter that carries the marker of a harmful fine-tune."""
    if is_degraded(folder):
        raise UserError(
            f"{folder} is marked as safety-degraded ({MARKER}) and is not exported: repair it with oneshot repair, and "
            "export the repair."
        )


def is_degraded_after(base: Path, given: list[GivenAdapter], *, subtract: bool) -> bool:
    """Return whether what a merge writes is safety-degraded and must be marked.

    Raises:
        UserError: the base is marked, and what is done to it is not the whole repair of it
    """
    repairs = [one.identity is not None and one.identity.kind == REPAIR for one in given]
    if is_degraded(base) and (subtract or not all(repairs) or any(one.weight != 1.0 for one in given)):
        raise UserError(
            f"{base} is marked as safety-degraded ({MARKER}): only repair patches of oneshot, at weight 1, may be "
            "merged into it."
        )
    return subtract and any(repairs)


def check_base(base: Path, given: list[GivenAdapter], *, subtract: bool) -> None:
    """Raise UserError if a patch says that it belongs to another checkpoint; plain adapters say nothing."""
    for one in given:
        check_identity(one.folder, base, applied=subtract)


def check_out(out: Path, inputs: list[Path]) -> None:
    """Raise UserError if ``out`` holds something, or lies in an input folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"The output {out} exists and is not empty: name a new folder, or remove it.")
    place = out.resolve()
    for folder in (path.resolve() for path in inputs):
        if place == folder or folder in place.parents:
            raise UserError(f"The output {out} lies in the input {folder}: name a folder elsewhere.")


def check_space(out: Path, nbytes: int) -> None:
    """Raise UserError if the disk of ``out`` has less free than ``nbytes``."""
    parent = next(path for path in out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise UserError(
            f"The result takes {nbytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: make room, or name a "
            "folder on another disk."
        )


@dataclass(frozen=True)
class NewAdapter:
    """What an adapter to write holds.

    Attributes:
        update: its factors
        dtype: what they are stored in
        base: name of the checkpoint that it belongs to, "" where that is not known
        linears: names of all linear layers of the model, or none where they are not known: the config then names every
            changed layer in full
    """

    update: Update
    dtype: torch.dtype
    base: str
    linears: list[str]


@phase("write")
def write_adapter(
    runtime: Runtime, out: Path, adapter: NewAdapter, tokenizer: Path, beside: Callable[[Path], None]
) -> None:
    """Write an adapter as a folder that appears when it is complete. Collective.

    Args:
        tokenizer: folder whose tokenizer and chat template go along
        beside: writes further files into the folder, on rank 0, before it appears
    """
    with replacing(runtime, out) as temporary, agree(runtime, f"writing the adapter {out}"):
        if runtime.is_main:
            with naming(temporary):
                write_patch(temporary, adapter.update, adapter.linears, adapter.base, adapter.dtype)
                _copy_tokenizer(tokenizer, temporary)
                beside(temporary)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in sorted({path for pattern in _TOKENIZER for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
