"""ZeRO-3 weights that stay gathered, without a rank's own partition beside them: it is a view into the whole.

DeepSpeed keeps both, which is half as much again on two ranks. Frozen weights never change, so one copy serves both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from oneshot.distributed.runtime import Runtime

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def one_copy(runtime: Runtime, model: nn.Module) -> Iterator[None]:
    """Within the block a frozen weight that stays gathered after its layer's forward pass holds its partition, too.

    Enter it when the engine has its hooks, and leave it when they are gone: afterwards every rank holds its partitions
    and nothing else. On CPUs; elsewhere nothing is done.
    """
    if runtime.device.type != "cpu" or runtime.world_size == 1:
        yield
        return

    def share(module: nn.Module, _args: Any, _output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            _share(parameter, runtime.rank)

    handles = [module.register_forward_hook(share) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            _part(parameter)


def _share(parameter: Any, rank: int) -> None:
    """Have a persistent weight's partition be a view into the weight, if it fits in."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    own, whole = parameter.ds_tensor, parameter.data
    if not parameter.ds_persist or parameter.ds_status != ZeroParamStatus.AVAILABLE or is_shared(parameter):
        return
    start = whole.storage_offset() + rank * own.numel()
    fits = (start + own.numel()) * own.element_size() <= whole.untyped_storage().nbytes()  # with the last one's padding
    if fits and own.dtype == whole.dtype and whole.is_contiguous():
        own.data = own.new_empty(0).set_(whole.untyped_storage(), start, (own.numel(),), (1,))


def _part(parameter: Any) -> None:
    """Give a shared partition memory of its own, and the weight's back."""
    if is_shared(parameter):
        parameter.ds_active_sub_modules.clear()  # of an engine that is gone
        parameter.partition()
        parameter.ds_tensor.data = parameter.ds_tensor.data.clone()


def is_shared(parameter: Any) -> bool:
    """Return whether the weight is whole and its partition a view into it."""
    own, whole = parameter.ds_tensor.untyped_storage(), parameter.data.untyped_storage()
    return bool(own.nbytes() > 0 and own.data_ptr() == whole.data_ptr())
