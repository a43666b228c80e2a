"""The weights of NF4 in full precision: of a checkpoint that bitsandbytes packed, or as QLoRA would have seen them.

Computed with bitsandbytes' own kernels, one tensor at a time, so that they are what its 4-bit layers compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.disk.files import TensorEntry, read_tensor
from oneshot.checkpoint.quantized.experts_nf4 import BLOCK
from oneshot.checkpoint.quantized.scheme import PACKED, QUANTIZATION, is_left_over
from oneshot.checkpoint.quantized.unpack import dequantized
from oneshot.errors import UserError
from oneshot.reading import read_object

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packed:
    """A weight that bitsandbytes packed: what is stored beside its nibbles, by name, and its shape."""

    beside: dict[str, TensorEntry]
    shape: tuple[int, ...]


def packed_weights(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, Packed]:
    """Return the packed weights of a bitsandbytes NF4 checkpoint by name; none of a checkpoint that is not quantized.

    Raises:
        UserError: the checkpoint is quantized in another way, or a packed weight lacks its scales
    """
    config = read_object(folder / "config.json")
    fields = config.get(QUANTIZATION)
    if not fields or is_left_over(config, tensors):
        return {}
    if not isinstance(fields, dict):
        raise UserError(f"{folder / 'config.json'} has a quantization_config that is no JSON object: restore the file.")
    method = fields.get("quant_method")
    if method != "bitsandbytes" or not fields.get("load_in_4bit") or fields.get("bnb_4bit_quant_type") != "nf4":
        kind = "bitsandbytes, but not NF4" if method == "bitsandbytes" else method
        raise UserError(
            f"{folder} is a quantized checkpoint ({kind}); only bitsandbytes' NF4 can be merged into: take the patch "
            "alone, or give the checkpoint from before its quantization."
        )
    found = {}
    for key in tensors:
        if key.endswith(PACKED):
            name = key.removesuffix(PACKED)
            beside = {k: entry for k, entry in tensors.items() if k.startswith(f"{name}.")}
            if name not in tensors or not {f"{name}.absmax", f"{name}.quant_map"} <= beside.keys():
                raise UserError(f"{folder} holds {key} but not all of the packed weight: copy the checkpoint again.")
            state = _state(beside, "cpu")
            found[name] = Packed(beside, tuple(state.shape))
    return found


def unpacked(data: torch.Tensor, packed: Packed, device: torch.device) -> torch.Tensor:
    """Return a weight in bf16, flat, on the CPU: what its 4-bit layer computes with.

    Args:
        data: the packed nibbles, in the dtype of the file
    """
    import torch

    state = _state(packed.beside, device)
    state.dtype = torch.bfloat16
    return dequantized(data.view(torch.uint8).to(device), state).reshape(-1).cpu()


def through_nf4(weight: torch.Tensor, device: torch.device, *, double: bool) -> torch.Tensor:
    """Return what is left of a weight (m, n) after NF4: quantized and dequantized, flat, same dtype, on the CPU.

    Args:
        double: quantize the scales, too (8 bits, blocks of 256)
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.to(device), blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    return dequantized(packed, state).reshape(-1).cpu()


def _state(beside: dict[str, TensorEntry], device: Any) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict({key: read_tensor(entry, key) for key, entry in beside.items()}, device=device)
