"""Which way round an adapter holds the factors of experts, where its base tells and its file does not."""

from __future__ import annotations

from pathlib import Path

from oneshot.checkpoint.adapters.adapter import Adapter, is_settled, read_adapter, settled
from oneshot.checkpoint.adapters.carrier import swapped_in
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.loading.architecture import architecture_of
from oneshot.checkpoint.loading.load import Source


def users_adapter(source: Source, *, trust_remote_code: bool = False) -> Adapter | None:
    """Return the adapter that a model is given as, the way round that its base takes it; none of a full checkpoint.

    Raises:
        UserError: as of ``read_adapter`` and ``on_base``
    """
    if source.adapter is None:
        return None
    return on_base(read_adapter(source.adapter), source.checkpoint, trust_remote_code=trust_remote_code)


def on_base(adapter: Adapter, base: Path, *, trust_remote_code: bool = False) -> Adapter:
    """Return an adapter as its base takes it: the model's class says the way round where the file leaves it open.

    Args:
        base: folder of the checkpoint

    Raises:
        UserError: as of ``architecture_of``, where that is asked
    """
    if is_settled(adapter):
        return adapter
    return settled(adapter, swapped=swapped_on(base, trust_remote_code=trust_remote_code))


def swapped_on(base: Path, *, trust_remote_code: bool = False) -> bool:
    """Return what ``swapped_in`` says of a checkpoint's model.

    Raises:
        UserError: as of ``architecture_of``
    """
    return swapped_in(architecture_of(base, list_tensors(base), trust_remote_code=trust_remote_code).model)
