"""NF4 while reading: linear weights are quantized range by range, with bitsandbytes' own kernel, as they come in.

A 4-bit weight is a flat tensor of packed nibbles with one scale per block of 64 weights. Blocks are independent, so
slices that begin at a block's border give the very bytes and scales that quantizing the whole tensor gives. Packed
weights are stored in the model's own dtype: DeepSpeed partitions parameters of one dtype, and bytes would be neither
partitioned nor trained beside (accelerate#3983).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.files import TensorEntry, read_tensor
from oneshot.checkpoint.layout import ITEM_SIZES, Range, partition
from oneshot.checkpoint.ranges import Read
from oneshot.checkpoint.scheme import holds_packed, is_stored
from oneshot.distributed.runtime import Runtime, gather_parts
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 64  # weights per scale, bitsandbytes' default
_CHUNK = 1 << 20  # weights quantized at a time, which bounds the kernel's temporary memory
_LINEAR_TOO = ("FalconLinear",)  # of transformers: a linear layer by another name, which would stay in 16 bits


@dataclass
class FourBit:
    """The 4-bit layers of a model that is being read.

    Attributes:
        layers: module name -> its bitsandbytes ``Linear4bit``
        stored: whether the checkpoint holds them packed already, as bitsandbytes saves them
        double: whether the scales are quantized in turn (8 bits, blocks of 256)
        dtype: what weights are quantized from, computed in and stored as
        scales: module name -> fp32 scales of the blocks that begin in this rank's range, until they are shared
    """

    layers: dict[str, Any]
    stored: bool
    double: bool
    dtype: torch.dtype
    scales: dict[str, torch.Tensor] = field(default_factory=dict)


def make_four_bit(model: Any, tensors: dict[str, TensorEntry], dtype: torch.dtype, *, double: bool) -> FourBit:
    """Turn the linear layers of a skeleton into 4-bit ones, still without memory, as transformers chooses them.

    The output head stays as it is, and so does a layer whose packed weights fill no whole number of elements.

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
        if type(module).__name__ in _LINEAR_TOO:
            module.__class__ = torch.nn.Linear
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
    skipped += [name for name, m in model.named_modules() if isinstance(m, Conv1D)]  # stored transposed
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
    return FourBit(layers, stored, double, dtype)


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


def weights_behind(four_bit: FourBit, read: Read, device: torch.device) -> Read:
    """Return the read of the weights, in whole blocks, of which a range of packed elements is made on ``device``."""
    import torch

    numel = math.prod(read.entry.shape)
    touched, _ = blocks(numel, read.wanted, 2 * four_bit.dtype.itemsize)
    start, stop = touched.start * BLOCK, min(touched.stop * BLOCK, numel)
    out = torch.empty(stop - start, dtype=four_bit.dtype, device=device)
    return replace(read, wanted=Range(start, stop, stop - start), out=out)


def pack(four_bit: FourBit, read: Read, weights: Read) -> None:
    """Fill ``read.out`` with packed elements made of ``weights``; keep the scales of the blocks that begin in it."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    values = weights.out
    assert read.out is not None
    assert values is not None
    own, size = read.wanted, four_bit.dtype.itemsize
    target = torch.zeros(own.size * size, dtype=torch.uint8, device=values.device)
    _, mine = blocks(math.prod(read.entry.shape), own, 2 * size)
    scales = torch.empty(mine.numel, device=values.device)
    for begin in range(weights.wanted.start, weights.wanted.stop, _CHUNK):
        end = min(begin + _CHUNK, weights.wanted.stop)
        part = values[begin - weights.wanted.start : end - weights.wanted.start]
        packed, state = quantize_4bit(part, blocksize=BLOCK, quant_type="nf4", quant_storage=torch.uint8)
        low, high = max(begin // 2, own.start * size), min(-(-end // 2), own.stop * size)
        target[low - own.start * size : high - own.start * size] = packed.view(-1)[low - begin // 2 : high - begin // 2]
        first, low = begin // BLOCK, max(begin // BLOCK, mine.start)
        scales[low - mine.start : -(-end // BLOCK) - mine.start] = state.absmax[low - first :]
    read.out.copy_(target.view(four_bit.dtype))
    four_bit.scales[read.name.removesuffix(".weight")] = scales


def finish(runtime: Runtime, four_bit: FourBit, tensors: dict[str, TensorEntry], *, partitioned: bool) -> None:
    """Give every layer its scales, whole on every rank, and have it compute from partitions. Collective.

    Args:
        partitioned: whether the packed weights are split over the ranks; else every rank holds them whole
    """
    for name, module in four_bit.layers.items():
        if four_bit.stored:
            state = _stored_state(four_bit, name, tensors, runtime.device)
        else:
            state = _state(runtime, four_bit, name, module, runtime.world_size if partitioned else 1)
        module.weight.quant_state = module.quant_state = state
        if partitioned:
            module.forward = functools.partial(_forward, module)


def _state(runtime: Runtime, four_bit: FourBit, name: str, module: Any, world_size: int) -> Any:
    """bitsandbytes' state of a layer, from the scales of all ranks, as its ``quantize_4bit`` makes it."""
    import torch
    from bitsandbytes import functional as bnb

    scales = four_bit.scales.pop(name)
    shape = (module.out_features, module.in_features)
    per_item = 2 * four_bit.dtype.itemsize
    if world_size > 1:
        numel = math.prod(shape)
        shares = [partition((numel // per_item,), rank, world_size) for rank in range(world_size)]
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


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``Linear4bit.forward`` for partitioned weights.

    Rows are flattened: for more dimensions the linear function that DeepSpeed puts in place of torch's, which
    bitsandbytes calls on a CPU, adds the bias in a second step and rounds twice.
    """
    rows = x.to(module.compute_dtype).flatten(0, -2)
    y: torch.Tensor = _product().apply(rows, module.weight, module.bias, module.quant_state)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


@functools.cache
def _product() -> Any:
    """The product with a 4-bit weight as an autograd function that holds the parameter, not what it holds now.

    bitsandbytes' own keeps a view of the gathered weight from the forward to the backward pass: every layer would
    stay gathered. The parameter is gathered anew before its layer's backward pass.
    """
    import torch
    from bitsandbytes import functional as bnb
    from bitsandbytes import matmul_4bit

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: Any, state: Any) -> torch.Tensor:
            ctx.weight, ctx.state = weight, state
            product: torch.Tensor = matmul_4bit(x, weight.data, quant_state=state, bias=bias)
            return product

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            weight = bnb.dequantize_4bit(ctx.weight.data, ctx.state).to(gradient.dtype)
            return gradient @ weight, None, None, None

    return Product
