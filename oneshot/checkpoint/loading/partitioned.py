"""Build a model that reads its weights by range, each byte once by all ranks together, 4-bit or as stored.

Under ZeRO-3 every rank reads the bytes of its partitions; where the model is replicated, a share that all then get.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.classes import auto_class
from oneshot.checkpoint.disk.files import TensorEntry
from oneshot.checkpoint.layout import Range, owners, partition
from oneshot.checkpoint.loading.configs import read_config, read_generation_config
from oneshot.checkpoint.loading.segments import Stored, checked, range_reads
from oneshot.checkpoint.loading.ties import untie
from oneshot.checkpoint.loading.weights import read_own
from oneshot.checkpoint.quantized.nf4 import FourBit, empty_like, finish
from oneshot.checkpoint.quantized.scheme import holds_packed, is_stored
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.distributed.deepspeed_config import deepspeed_config
from oneshot.distributed.runtime import Runtime, agree, exchange
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters (each once, however often tied) and persistent buffers, by their name on disk."""
    persistent = set(model.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    found |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return found


def why_not(model: PreTrainedModel, stored: Stored) -> str | None:
    """Return why the checkpoint cannot be read range by range, or none if it can.

    Where transformers transposes or permutes tensors while it loads them, or where weights are quantized in a way that
    is not read here, a parameter is no list of ranges of stored tensors.

    Raises:
        UserError: a tensor has another shape than the config promises
    """
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized and not is_stored(model.config) and not stored.scaled:
        return "the checkpoint is quantized"
    for name, tensor in own_tensors(model).items():
        parts = stored.loading.made.get(name)
        if tensor.dtype != _kept_dtype(model, name, tensor.dtype):
            return f"transformers keeps {name} in another dtype"
        if parts is not None and holds_packed(stored.tensors, parts.segments[0].name):
            continue
        if parts is None:
            reason = stored.loading.reasons.get(name)
            return reason or f"the checkpoint stores {name} under another name or in parts"
        behind = [stored.behind(segment)[1] for segment in parts.segments]
        odd = [entry.dtype for entry, segment in zip(behind, parts.segments) if not stored.is_float(segment)]
        if tensor.is_floating_point() and odd:
            return f"the checkpoint stores {name} as {odd[0]}"
        if parts.shape != tuple(tensor.shape):
            raise UserError(
                f"{behind[0].shard} holds {name} of shape {list(parts.shape)} where config.json makes it "
                f"{list(tensor.shape)}: config and shards are not of one checkpoint, copy it again."
            )
    return None


def _kept_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers holds a weight of a model of this dtype: a few models keep some in fp32."""
    import torch

    strict, others = (getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("_strict", ""))
    kept = {*(strict if dtype.itemsize == 2 else ()), *(others if dtype == torch.float16 else ())}
    return torch.float32 if any(re.search(rf"(^|\.){module}(\.|$)", name) for module in kept) else dtype


def skeleton(
    folder: Path, tensors: dict[str, TensorEntry], dtype: torch.dtype, attention: str, trust_remote_code: bool
) -> Any:
    """Return the model of a checkpoint's config with parameters on the meta device and real buffers, tied.

    Args:
        tensors: of the checkpoint; what they hold apart is not tied
    """
    import torch
    from accelerate import init_empty_weights

    config = read_config(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    untie(model, tensors)
    for name, buffer in own_tensors(model).items():
        if buffer.device.type != "meta":
            buffer.data = buffer.to(_kept_dtype(model, name, buffer.dtype))
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            assert buffer is None or buffer.device != torch.device("meta"), f"buffer {name} was not built"
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
    model.config._name_or_path = str(folder)
    return model


def fill_partitions(
    runtime: Runtime, model: nn.Module, stored: Stored, dtype: torch.dtype, four_bit: FourBit | None = None
) -> None:
    """Turn the skeleton's parameters into ZeRO-3 partitions filled from the checkpoint. Collective.

    Nothing is sent but the scales of 4-bit weights. Afterwards each rank holds exactly what the layout says, in
    ``dtype``; asserted. Persistent buffers are read whole.

    Args:
        stored: the checkpoint, its checksums not read yet

    Raises:
        UserError: on every rank, if any rank could not read its bytes
    """
    import deepspeed
    import torch

    names = _give_shapes(model, dtype, runtime.device, four_bit)
    own: dict[str, torch.Tensor] = {}

    class FileInit(deepspeed.zero.Init):  # type: ignore[misc]  # deepspeed has no types
        """DeepSpeed's own conversion, but with an empty partition, to be read, instead of one cut from the whole."""

        def _convert_to_zero_parameters(self, params: Iterable[Any]) -> None:
            params = list(params)
            # parameters that join later (a LoRA's) are converted through the same object, and are in no file
            super()._convert_to_zero_parameters([p for p in params if id(p) not in names])
            for parameter in [p for p in params if id(p) in names]:
                self._convert_to_deepspeed_param(parameter)
                wanted = partition(tuple(parameter.ds_shape), runtime.rank, runtime.world_size)
                home = self.local_device if parameter.ds_persist else self.remote_device
                part = own[names[id(parameter)]] = torch.empty(wanted.size, dtype=dtype, device=home)
                if self.pin_memory and part.device.type == "cpu":
                    part = own[names[id(parameter)]] = deepspeed.accelerator.get_accelerator().pin_memory(part)
                _install(parameter, part, wanted, runtime.world_size)

    with agree(runtime, f"reading the checkpoint {stored.folder}"):
        stored = checked(stored)
        FileInit(module=model, config_dict_or_path=deepspeed_config(runtime, dtype=dtype), dtype=dtype)
        for _ in read_own(runtime, model, stored, own, four_bit):
            pass
        _read_buffers(model, stored)
    names.clear()  # a parameter made later may get the id of one that is gone by then
    if four_bit is not None:
        finish(runtime, four_bit, stored.tensors)
    _check(runtime, model)


def made_as_read(model: Any, stored: Stored) -> None:
    """Have a model that was read say how: by which conversions it is named as it is saved, and in which precision."""
    model._weight_conversions = stored.loading.conversions
    if stored.scaled:
        del model.config.quantization_config


def _install(parameter: Any, own: Any, wanted: Range, world_size: int) -> None:
    """Make ``own`` the partition of a parameter, with the marks that DeepSpeed's own partitioning leaves."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus, free_param

    own.requires_grad = False
    parameter.ds_tensor = own
    own.ds_numel = wanted.size
    own.status = PartitionedParamStatus.AVAILABLE
    own.final_location = None
    parameter.ds_numel_aligned = wanted.size * world_size
    free_param(parameter)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def fill_whole(
    runtime: Runtime, model: nn.Module, stored: Stored, dtype: torch.dtype, four_bit: FourBit | None = None
) -> None:
    """Fill the skeleton with whole tensors, on this rank's device. Collective.

    Each rank reads its share of every tensor, so that a byte is read once by all of them together, and gets the others
    from the other ranks.

    Args:
        stored: the checkpoint, its checksums not read yet

    Raises:
        UserError: on every rank, if any rank could not read
    """
    import torch

    _give_shapes(model, dtype, runtime.device, four_bit)
    with agree(runtime, f"opening the checkpoint {stored.folder}"):
        stored = checked(stored)
    shares: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.numel(), dtype=dtype, device=runtime.device)
        parameter.data = whole.view(parameter.shape)
        shares[name] = [whole[own.start : own.stop] for own in owners(tuple(parameter.shape), runtime.world_size)]
    with agree(runtime, f"reading the checkpoint {stored.folder}"):
        own = {name: parts[runtime.rank] for name, parts in shares.items()}
        for name in read_own(runtime, model, stored, own, four_bit):
            exchange(runtime, shares[name])
        _read_buffers(model, stored)
    if four_bit is not None:
        finish(runtime, four_bit, stored.tensors)
    else:
        model.to(runtime.device)  # its buffers


def _read_buffers(model: nn.Module, stored: Stored) -> None:
    parameters = {name for name, _ in model.named_parameters()}
    for name, buffer in own_tensors(model).items():
        if name not in parameters:
            whole = partition(tuple(buffer.shape), 0, 1)
            flat = buffer.new_empty(whole.size)
            read_all(range_reads(stored, stored.loading.made[name], whole, flat))
            buffer.copy_(flat.view(buffer.shape))


def _give_shapes(
    model: nn.Module, dtype: torch.dtype, device: torch.device, four_bit: FourBit | None
) -> dict[int, str]:
    """Replace meta parameters by ones on the device that have the shape, but one element of memory: id -> name."""
    import torch
    from torch import nn

    before = len(list(model.parameters()))
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if four_bit is not None and four_bit.takes(f"{path}.{name}"):
                made[id(parameter)] = empty_like(module, parameter, dtype, device)
            elif id(parameter) not in made:
                data = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(names) == before, "tied weights stay tied"
    return names


def _check(runtime: Runtime, model: nn.Module) -> None:
    parameter: Any
    for name, parameter in model.named_parameters():
        wanted = partition(tuple(parameter.ds_shape), runtime.rank, runtime.world_size)
        assert parameter.ds_tensor is not None, f"{name} was not filled"
        assert parameter.ds_tensor.numel() == wanted.size, f"{name}: {parameter.ds_tensor.numel()} != {wanted.size}"
