"""In which scheme a checkpoint's weights are quantized: what its config says, and whether its files bear it out."""

from __future__ import annotations

from typing import Any

from oneshot.checkpoint.disk.files import TensorEntry
from oneshot.checkpoint.layout import FLOATS
from oneshot.errors import UserError

QUANTIZATION = "quantization_config"  # of a config
PACKED = ".quant_state.bitsandbytes__nf4"  # after a weight's name: bitsandbytes stores it packed
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BESIDE = ("scale", "scale_inv", "scales", "zero_point", "SCB", "absmax")  # how names end that quantized weights need


def is_stored(config: Any) -> bool:
    """Return whether a checkpoint's config says that bitsandbytes quantized its weights to 4 bits.

    Args:
        config: transformers' config object, or the fields of a config.json
    """
    return bool(_bitsandbytes(config).get("load_in_4bit", False))


def refuse_eight_bit(config: Any) -> None:
    """Raise UserError for a checkpoint in bitsandbytes' 8 bits, whose row scales ZeRO-3 would not follow."""
    if _bitsandbytes(config).get("load_in_8bit", False):
        raise UserError(
            "The checkpoint is quantized to 8 bits, which is wrong under ZeRO-3 (bitsandbytes#1451): give the "
            "full-precision checkpoint with --model.quantize nf4, or run on one process."
        )


def _bitsandbytes(config: Any) -> dict[str, Any]:
    """The quantization fields of a config where they are bitsandbytes', else none."""
    fields = config.get(QUANTIZATION) if isinstance(config, dict) else getattr(config, QUANTIZATION, None)
    fields = fields if isinstance(fields, dict) or fields is None else fields.to_dict()
    return fields if fields and fields.get("quant_method") == "bitsandbytes" else {}


def holds_packed(tensors: dict[str, TensorEntry], name: str) -> bool:
    """Return whether a checkpoint holds this weight packed, as bitsandbytes saves it."""
    return name + PACKED in tensors


def is_left_over(fields: dict[str, Any], tensors: dict[str, TensorEntry]) -> bool:
    """Return whether a config.json says that weights are quantized which are not (unsloth#1601).

    A merge that dequantizes, or a fine-tune of a dequantized model, is often saved with the config from before.
    """
    said = bool(fields.get(QUANTIZATION)) and bool(tensors)
    plain = all(entry.dtype in FLOATS and not name.endswith(BESIDE) for name, entry in tensors.items())
    return said and plain and not any(name.endswith(PACKED) for name in tensors)


def stored_dtype(fields: dict[str, Any], tensors: dict[str, TensorEntry]) -> str:
    """Return the dtype in which a checkpoint is loaded where nobody asks for another, as torch names it.

    Args:
        fields: of its config.json
    """
    # the scales beside packed weights are fp32 whatever the rest is
    packed = is_stored(fields) and not is_left_over(fields, tensors)
    names = [name for name in tensors if not (packed and ".weight." in name)]
    found = {_DTYPES[tensors[name].dtype] for name in names if tensors[name].dtype in _DTYPES} or {"float32"}
    return found.pop() if len(found) == 1 else "bfloat16" if "bfloat16" in found else "float32"
