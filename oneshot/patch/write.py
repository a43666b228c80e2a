"""A repair's files: the patch, as PEFT and servers load it, and the merged checkpoint."""

from __future__ import annotations

from pathlib import Path

from oneshot.checkpoint.adapter import write_patch, write_repaired_adapter
from oneshot.checkpoint.folders import bytes_in
from oneshot.checkpoint.identity import REPAIR, write_identity
from oneshot.checkpoint.merge import merge_update
from oneshot.checkpoint.save import save_checkpoint
from oneshot.checkpoint.seal import seal
from oneshot.checkpoint.update import Update
from oneshot.distributed.phases import count, counting, phase
from oneshot.distributed.runtime import agree
from oneshot.errors import UserError
from oneshot.patch.bench import Bench


@phase("write")
def write_repair(bench: Bench, update: Update, patch: Path, merged: Path | None) -> None:
    """Write the patch, and the merged checkpoint if asked for, while the model is still loaded. Collective.

    Raises:
        UserError: on every rank alike, where there is nothing to write or it cannot be written
    """
    request, method = bench.request, bench.request.recipe.method
    source, settings = request.source, request.settings.model
    if not update:  # alike on every rank
        raise UserError(
            "The repair found no step that helps, so there is no patch to write: the model may refuse the example "
            "already (oneshot score measures it); give another --example, or another repair.method."
        )
    with agree(request.runtime, f"writing the patch {patch}"):
        if request.runtime.is_main:
            if request.adapter is not None and method.keeps_adapter:
                write_repaired_adapter(patch, request.adapter, update)
            else:
                write_patch(patch, update, bench.linears.every, source.name, source.written)
            request.tokenizer.save_pretrained(patch)
            write_identity(patch, source.checkpoint, kind=REPAIR, base=source.name)
            seal(patch)
            if counting():
                count(written=bytes_in(patch))
    if merged is None:
        return
    if method.changes_all:
        dtype, stock = source.written, settings.stock_io
        save_checkpoint(request.runtime, bench.model, request.tokenizer, merged, dtype, stock=stock)
    else:  # from the files: the weights in memory may be partitioned, or in 4 bits
        trusted = settings.trust_remote_code
        merge_update(request.runtime, source.checkpoint, update, merged, trust_remote_code=trusted)
