"""Does PEFT find the place of every factor of a patch? Asked of PEFT itself, on the model without its weights.

PEFT names what it loads by its own rules, rewrites targets of some architectures, and only warns of factors for which
it found no place (huggingface/peft#3711): such a patch loads, and is another one than was measured.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapter import PREFIX, write_patch
from oneshot.checkpoint.effective import factor_of
from oneshot.checkpoint.files import read_header
from oneshot.checkpoint.names import ADAPTER_TENSORS
from oneshot.checkpoint.update import Update
from oneshot.errors import UserError, first_line
from oneshot.versions import package_version

if TYPE_CHECKING:
    import torch

_SHOWN = 3  # names of layers in a message


def write_loadable(
    folder: Path,
    update: Update,
    linears: list[str],
    base: str,
    dtype: torch.dtype,
    model: Any,
    commit: str | None = None,
) -> None:
    """Write an update as ``write_patch`` does, by the first of three ways to name its layers that PEFT loads whole.

    Short names; full ones, where another module has a name of the same end; and the names of weights, for layers that
    PEFT takes for a part of fused experts (gate_proj, up_proj and down_proj of dense and shared MLPs in some mixtures).

    Args:
        folder, update, linears, base, dtype, commit: as of ``write_patch``
        model: the base's, of transformers, its parameters on the meta device

    Raises:
        UserError: PEFT does not load all of it by any names
    """
    lost = list[str]()
    for names in [linears, []] if linears else [[]]:
        write_patch(folder, update, names, base, dtype, commit=commit)
        try:
            if not (lost := not_injected(folder, model)):
                return
        except UserError:  # a short name is that of a wrapper as well
            if not names:
                raise
    write_patch(folder, update, [], base, dtype, [name for name in lost if name in update], commit)
    check_loads(folder, model)


def check_loads(folder: Path, model: Any) -> None:
    """Raise UserError if PEFT would not load all of an adapter.

    Args:
        model: see ``write_loadable``
    """
    if not (lost := not_injected(folder, model)):
        return
    said = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
    raise UserError(
        f"PEFT {package_version('peft')} would load another patch than was measured, as it finds no place for what "
        f"belongs to {said}: leave these layers out with --repair.targets, a regular expression of those to patch."
    )


def not_injected(folder: Path, model: Any) -> list[str]:
    """Return the layers of which PEFT would not load the stored factors where they are meant to be, sorted.

    Reads the adapter's header alone: where a factor goes is a matter of names and shapes.

    Args:
        folder: of a LoRA adapter
        model: see ``write_loadable``
    """
    import torch
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    entries = read_header(folder / ADAPTER_TENSORS)
    tensors = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.init_lora_weights = True  # what is loaded takes its place, and not every kind can be on the meta device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are missing: found below
        try:
            loaded = PeftModel(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            result: Any = set_peft_model_state_dict(loaded, dict(tensors), low_cpu_mem_usage=True)
        except Exception as error:  # what PEFT cannot place shows as an error of any kind
            raise UserError(
                f"PEFT {package_version('peft')} does not load the patch on this model ({first_line(error)}): leave "
                "the layer out with --repair.targets, a regular expression of those to be patched."
            ) from error
    try:
        return _lost(loaded, tensors, [*result.missing_keys, *result.unexpected_keys])
    finally:
        loaded.unload()


def _lost(loaded: Any, tensors: dict[str, torch.Tensor], unmatched: list[str]) -> list[str]:
    """Layers whose factors PEFT has put nowhere, in another shape, or which it gave factors that the file has not.

    Args:
        loaded: the model with the adapter, on the meta device
        unmatched: names of tensors for which there was no place, or of places for which there was no tensor
    """
    modules = dict(loaded.base_model.model.named_modules())
    lost = {name.split(".lora_")[0].removeprefix(PREFIX) for name in unmatched if ".lora_" in name}
    meant = set()
    for key, stored in tensors.items():
        if (factor := factor_of(key)) is None:
            continue
        module, which = factor
        meant.add(module)
        factors = getattr(modules.get(module), f"lora_{which}", {})
        if "default" not in factors or factors["default"].weight.shape != stored.shape:
            lost.add(module)
    injected = {name for name, module in modules.items() if "default" in getattr(module, "lora_A", {})}
    return sorted(lost | (injected - meant))
