"""A user's own adapter: does it fit its base, and can it be written again as PEFT loads it? Found before a repair."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from oneshot.checkpoint.adapters.adapter import Adapter
from oneshot.checkpoint.adapters.added import check_fits
from oneshot.checkpoint.adapters.experts import layers_of
from oneshot.checkpoint.adapters.injected import why_not_loaded, write_loadable
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.loading.partitioned import skeleton
from oneshot.errors import UserError


def plain_model(source: Source, *, trust_remote_code: bool) -> Any:
    """Return the model that a patch is for, on the meta device."""
    folder = source.checkpoint
    return skeleton(folder, list_tensors(folder), source.written, "eager", trust_remote_code)


def check_given(source: Source, adapter: Adapter, *, trust_remote_code: bool) -> None:
    """Check that a repaired adapter can be written: as the given one is, or else as a patch is. On one rank only.

    Raises:
        UserError: it does not fit the base, or PEFT does not load all of it in any form
    """
    assert source.adapter is not None
    plain = plain_model(source, trust_remote_code=trust_remote_code)
    layers = layers_of(plain)
    for name, factors in adapter.update.items():
        check_fits(layers, name, factors)
    if not (why := why_not_loaded(source.adapter, plain)):
        return
    like = {name: Factors(0 * one.b[:, :1], 0 * one.a[:1]) for name, one in adapter.update.items()}
    with TemporaryDirectory() as folder:  # where factors go is a matter of names and shapes
        try:
            write_loadable(Path(folder), like, [], source.name, adapter.dtype, plain)
        except UserError as error:
            raise UserError(
                f"The adapter {source.adapter} would not be whole after a repair, as {why}: merge it first, with "
                f"oneshot export --model {source.name} --adapter {source.adapter} --out MERGED, and repair MERGED with "
                f"--reference {source.name}."
            ) from error
