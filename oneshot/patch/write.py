"""A repair's files: the patch, as PEFT and servers load it, and the merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.adapter import write_repaired_adapter
from oneshot.checkpoint.adapters.injected import check_loads, why_not_loaded, write_loadable
from oneshot.checkpoint.adapters.update import Update
from oneshot.checkpoint.disk.folders import naming, replacing
from oneshot.checkpoint.loading.configs import config_fields
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.checkpoint.quantized.scheme import is_stored
from oneshot.checkpoint.writing.beside import copy_tokenizer
from oneshot.checkpoint.writing.identity import REPAIR, write_identity
from oneshot.checkpoint.writing.save import save_checkpoint
from oneshot.checkpoint.writing.standing import (
    NF4,
    NF4_DOUBLE,
    ORIGINAL,
    PACKED,
    begin_standing,
    comes_from_degraded,
    mark_unmeasured,
)
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import agree
from oneshot.errors import UserError, first_line
from oneshot.patch.bench import Bench
from oneshot.patch.given import plain_model
from oneshot.patch.request import Request


def from_degraded(request: Request) -> bool:
    """Return whether the model to be repaired is, or was, marked as safety-degraded."""
    given = (request.source.checkpoint, request.source.adapter)
    return any(comes_from_degraded(folder) for folder in given if folder is not None)


def measured_form(source: Source, *, double_quant: bool) -> str:
    """Return in which form the weights are that are measured, as ``Standing`` has it."""
    if not source.four_bit:
        return ORIGINAL
    if is_stored(config_fields(source.checkpoint)):
        return PACKED
    return NF4_DOUBLE if double_quant else NF4


def _write_factors(bench: Bench, update: Update, folder: Path, plain: Any) -> None:
    """Write the patch itself: a user's own adapter as it was, where PEFT loads all of that one."""
    request, source = bench.request, bench.request.source
    own = source.adapter if request.recipe.method.keeps_adapter else None
    if request.adapter is not None and own is not None and not why_not_loaded(own, plain):
        write_repaired_adapter(folder, request.adapter, update)
        check_loads(folder, plain)
    else:
        write_loadable(folder, update, bench.linears.every, source.name, source.written, plain, source.commit)


def _say_whose(temporary: Path, patch: Path, source: Source, plain: Any) -> None:
    """Write into a patch which checkpoint it belongs to.

    A fault of ours in finding that out costs no patch, which is whole without it.
    """
    try:
        write_identity(temporary, source.checkpoint, kind=REPAIR, base=source.name, model=plain)
    except (UserError, OSError):  # the checkpoint is no longer what was repaired, or the disk is full
        raise
    except Exception as error:
        print(
            f"Warning: {patch} does not say which model it belongs to ({type(error).__name__}: {first_line(error)}), "
            f"so that nothing checks it: add it to {source.name} only.",
            flush=True,
        )


@phase("write")
def write_repair(bench: Bench, update: Update, patch: Path, merged: Path | None) -> None:
    """Write the patch, and the merged checkpoint if asked for, while the model is still loaded. Collective.

    What comes from a safety-degraded model appears with the marker: it is lifted once there is a verdict.

    Raises:
        UserError: on every rank alike, where there is nothing to write or it cannot be written
    """
    request, method = bench.request, bench.request.recipe.method
    source, settings, degraded = request.source, request.settings.model, False
    if not update:  # alike on every rank
        raise UserError(
            "The repair found no step that helps, so there is no patch to write: the model may refuse the example "
            "already (oneshot score measures it); give another --example, or another repair.method."
        )
    with agree(request.runtime, "looking where the model comes from"):
        degraded = from_degraded(request)

    def standing_of(folder: Path) -> None:
        form = measured_form(source, double_quant=settings.double_quant)
        begin_standing(folder, degraded=degraded, form=form, checkpoint=source.checkpoint, tokenizer=source.tokenizer)

    def standing(folder: Path) -> None:  # on rank 0, before the weights are there and before anyone sees the folder
        if degraded:
            mark_unmeasured(folder, source.name)
        standing_of(folder)

    with replacing(request.runtime, patch) as temporary, agree(request.runtime, f"writing the patch {patch}"):
        if request.runtime.is_main:
            with naming(temporary):
                standing(temporary)
                plain = plain_model(source, trust_remote_code=settings.trust_remote_code)
                _write_factors(bench, update, temporary, plain)
                copy_tokenizer(source.tokenizer, temporary)
                _say_whose(temporary, patch, source, plain)
                standing_of(temporary)  # with the hashes
    if merged is None:
        return
    if method.changes_all:
        dtype, stock = source.written, settings.stock_io
        save_checkpoint(request.runtime, bench.model, source, merged, dtype, stock=stock, beside=standing)
    else:  # from the files: the weights in memory may be partitioned, or in 4 bits
        merge_update(
            request.runtime,
            source.checkpoint,
            update,
            merged,
            tokenizer=source.tokenizer,
            trust_remote_code=settings.trust_remote_code,
            beside=standing,
        )
