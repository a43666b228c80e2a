"""NF4 while reading: linear weights are quantized range by range, with bitsandbytes' own kernel, as they come in.

A 4-bit weight is a flat tensor of packed nibbles with a scale per block of 64 weights. Blocks are independent: slices
from a block's border on give the bytes of the whole. They are stored in the model's dtype: DeepSpeed partitions
parameters of one dtype, and no bytes (accelerate#3983).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.classes import is_held_in_nf4, is_linear_alone
from oneshot.checkpoint.disk.files import TensorEntry, read_tensor
from oneshot.checkpoint.layout import ITEM_SIZES, Range, partition
from oneshot.checkpoint.quantized.experts_forward import compute_one_by_one
from oneshot.checkpoint.quantized.experts_nf4 import BLOCK, pack_experts, packed_experts
from oneshot.checkpoint.quantized.linear4bit import forward
from oneshot.checkpoint.quantized.scheme import holds_packed, is_stored
from oneshot.checkpoint.reads.ranges import Read
from oneshot.checkpoint.reads.traced import Traced
from oneshot.distributed.runtime import Runtime, gather_parts
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # weights quantized at a time, which bounds the kernel's temporary memory


@dataclass
class FourBit:
    """The 4-bit layers of a model that is being read.

    Attributes:
        layers: module name -> its bitsandbytes ``Linear4bit``
        stored: whether the checkpoint holds them packed already, as bitsandbytes saves them
        double: whether the scales are quantized in turn (8 bits, blocks of 256)
        dtype: what weights are quantized from, computed in and stored as
        experts: parameter of fused experts in 4 bits -> (module, projection)
        kept: parameters of fused experts that stay as they are
        scales: module or parameter of experts -> fp32 scales of this rank's blocks, until they are shared
    """

    layers: dict[str, Any]
    stored: bool
    double: bool
    dtype: torch.dtype
    experts: dict[str, tuple[Any, str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def takes(self, parameter: str) -> bool:
        """Return whether a parameter is held in 4 bits."""
        return parameter.removesuffix(".weight") in self.layers or parameter in self.experts


@dataclass(frozen=True)
class Share:
    """A rank's elements of a packed weight.

    Attributes:
        name: the parameter's
        parts: where its weights are stored
        own: range of packed elements
        out: (own.size,), where they go
    """

    name: str
    parts: Traced
    own: Range
    out: torch.Tensor

    @property
    def numel(self) -> int:
        """Weights of the whole parameter."""
        return math.prod(self.parts.shape)


def make_four_bit(model: Any, tensors: dict[str, TensorEntry], dtype: torch.dtype, *, double: bool) -> FourBit:
    """Turn the linear layers of a skeleton into 4-bit ones, still without memory, as transformers chooses them.

    The output head stays as it is, and so does a layer that is read past it, or does not fill whole elements.

    Args:
        tensors: of the checkpoint; where it is quantized already, what it holds decides
        double: quantize the scales too

    Raises:
        UserError: no layer is left to quantize, or a quantized checkpoint whose weights fill no whole elements
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    for module in model.modules():
        if is_linear_alone(module):
            module.__class__ = torch.nn.Linear  # whichever its name: transformers looks for this class
    stored = is_stored(model.config)
    linears = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    per_item = 2 * dtype.itemsize
    uneven = [name for name, m in linears.items() if m.in_features * m.out_features % per_item]
    if stored:
        skipped = [name for name in linears if not holds_packed(tensors, f"{name}.weight")]
        broken = [name for name in uneven if name not in skipped]
        if broken:
            raise UserError(
                f"The packed weights of {broken[0]} fill no whole number of {dtype} elements, so they cannot be "
                "partitioned: give the checkpoint from before its quantization."
            )
    else:
        skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules) + uneven
    skipped += [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
    skipped += [name for name, m in linears.items() if not is_held_in_nf4(model, name, m)]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    replace_with_bnb_linear(model, skipped, config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    if not layers:
        raise UserError("The model has no linear layer that can be quantized: leave model.quantize out.")
    for module in layers.values():
        # on a CPU with AVX512-bf16 these layers would repack their weights at the first call: no partition fits then
        module.support_avx512bf16_for_cpu = False
        module.weight = packed_parameter(module, dtype, "meta")
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    experts = {} if stored else pack_experts(model, dtype)
    compute_one_by_one(holder for holder, _ in experts.values())
    return FourBit(layers, stored, double, dtype, experts, _kept(model))


def _kept(model: Any) -> list[str]:
    """Parameters that hold several matrices, and are no convolution's."""
    from torch.nn.modules.conv import _ConvNd

    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and not isinstance(module, _ConvNd)
    ]


def what_stays(four_bit: FourBit | None) -> str:
    """Return what to say of experts that are not read in 4 bits; nothing where there are none."""
    if four_bit is None or not four_bit.kept:
        return ""
    return (
        f"{len(four_bit.kept)} tensors of fused experts stay in {str(four_bit.dtype).removeprefix('torch.')}, "
        f"{four_bit.kept[0]} for one: in 4 bits are those that can be computed each by itself and whose matrices fill "
        "whole blocks of 64 weights, read from a checkpoint that is not in 4 bits itself."
    )


def empty_like(module: Any, parameter: Any, dtype: torch.dtype, device: Any) -> Any:
    """Return a packed parameter for one without values, a layer's or of experts."""
    if (shape := getattr(parameter, "unpacked_shape", None)) is not None:
        return packed_experts(shape, dtype, device)
    return packed_parameter(module, dtype, device)


def packed_parameter(module: Any, dtype: torch.dtype, device: Any) -> Any:
    """Return a layer's packed weight, of its full shape (packed elements, 1) but one element of memory."""
    import torch
    from bitsandbytes.nn import Params4bit

    packed = module.in_features * module.out_features // (2 * dtype.itemsize)
    data = torch.zeros((), dtype=dtype, device=device).expand(packed, 1)
    return Params4bit(data, quant_type="nf4", quant_storage=dtype, module=module, bnb_quantized=True)


def blocks(numel: int, own: Range, per_item: int) -> tuple[Range, Range]:
    """Return the blocks that a range of packed elements touches, and those of them that begin in it.

    Args:
        numel: weights of the tensor
        own: range of packed elements
        per_item: weights in one of them
    """
    begin, end = own.start * per_item, min(own.stop * per_item, numel)
    touched = Range(begin // BLOCK, -(-end // BLOCK), 0) if own.numel else Range(0, 0, 0)
    first = -(-begin // BLOCK)
    return touched, Range(first, max(first, touched.stop), 0)


def as_bytes(read: Read) -> Read:
    """Return the read of packed elements, whatever dtype the file gives them, as of the bytes that they are."""
    import torch

    assert read.out is not None
    entry, wanted, item, size = read.entry, read.wanted, ITEM_SIZES[read.entry.dtype], read.out.element_size()
    return replace(
        read,
        entry=replace(entry, dtype="U8", shape=(math.prod(entry.shape) * item,)),
        wanted=Range(wanted.start * size, wanted.stop * size, wanted.size * size),
        out=read.out.view(torch.uint8),
        pieces=[(start * item, stop * item, checksum) for start, stop, checksum in read.pieces],
    )


def weights_behind(four_bit: FourBit, share: Share, device: torch.device) -> tuple[Range, torch.Tensor]:
    """Return which weights, in whole blocks, a share of packed elements is made of, and where to read them to."""
    import torch

    touched, _ = blocks(share.numel, share.own, 2 * four_bit.dtype.itemsize)
    start, stop = touched.start * BLOCK, min(touched.stop * BLOCK, share.numel)
    return Range(start, stop, stop - start), torch.empty(stop - start, dtype=four_bit.dtype, device=device)


def pack(four_bit: FourBit, share: Share, values: torch.Tensor) -> None:
    """Fill ``share.out`` with packed elements made of ``values``, the weights behind it.

    The scales of the blocks that begin in it are kept.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    own, size = share.own, four_bit.dtype.itemsize
    target = torch.zeros(own.size * size, dtype=torch.uint8, device=values.device)
    touched, mine = blocks(share.numel, own, 2 * size)
    scales = torch.empty(mine.numel, device=values.device)
    start = touched.start * BLOCK
    for begin in range(start, start + len(values), _CHUNK):
        end = min(begin + _CHUNK, start + len(values))
        part = values[begin - start : end - start]
        packed, state = quantize_4bit(part, blocksize=BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        low, high = max(begin // 2, own.start * size), min(-(-end // 2), own.stop * size)
        target[low - own.start * size : high - own.start * size] = packed.view(-1)[low - begin // 2 : high - begin // 2]
        first, low = begin // BLOCK, max(begin // BLOCK, mine.start)
        scales[low - mine.start : -(-end // BLOCK) - mine.start] = state.absmax[low - first :]
    share.out.copy_(target.view(four_bit.dtype))
    four_bit.scales[share.name.removesuffix(".weight")] = scales


def finish(runtime: Runtime, four_bit: FourBit, tensors: dict[str, TensorEntry]) -> None:
    """Give every layer its scales, whole on every rank, and have it compute from partitions. Collective."""
    for name, module in four_bit.layers.items():
        if four_bit.stored:
            state = _stored_state(four_bit, name, tensors, runtime.device)
        else:
            state = _state(runtime, four_bit, name, (module.out_features, module.in_features))
        module.weight.quant_state = module.quant_state = state
        module.forward = functools.partial(forward, module)
    for name, (experts, projection) in four_bit.experts.items():
        parameter: Any = getattr(experts, projection)
        parameter.quant_state = _state(runtime, four_bit, name, parameter.unpacked_shape)


def _state(runtime: Runtime, four_bit: FourBit, name: str, shape: tuple[int, ...]) -> Any:
    """bitsandbytes' state of a weight, from the scales of all ranks, as its ``quantize_4bit`` makes it."""
    import torch
    from bitsandbytes import functional as bnb

    scales = four_bit.scales.pop(name)
    per_item = 2 * four_bit.dtype.itemsize
    if runtime.world_size > 1:
        numel = math.prod(shape)
        shares = [partition((numel // per_item,), rank, runtime.world_size) for rank in range(runtime.world_size)]
        scales = gather_parts(runtime, scales, [blocks(numel, share, per_item)[1].numel for share in shares])
    nested = {}
    if four_bit.double:
        offset = scales.mean()
        scales, second = bnb.quantize_blockwise(scales - offset, blocksize=256)
        nested = {"offset": offset, "state2": second}
    code = bnb.get_4bit_type("nf4", device=runtime.device)
    return bnb.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=four_bit.dtype, blocksize=BLOCK, code=code, quant_type="nf4",
        **nested,
    )  # fmt: skip


def _stored_state(four_bit: FourBit, name: str, tensors: dict[str, TensorEntry], device: Any) -> Any:
    """bitsandbytes' state of a layer, from the tensors beside its packed weight; unpacked in our dtype, not its own."""
    from bitsandbytes.functional import QuantState

    prefix = f"{name}.weight."
    found = {
        key.removeprefix(prefix): read_tensor(entry, key) for key, entry in tensors.items() if key.startswith(prefix)
    }
    state = QuantState.from_dict(found, device=device)
    state.dtype = four_bit.dtype
    return state
