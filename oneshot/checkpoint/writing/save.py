"""Write checkpoints and adapters from a model that may be partitioned over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.disk.folders import naming, replacing
from oneshot.checkpoint.writing.beside import Origin, write_beside, write_tokenizer
from oneshot.checkpoint.writing.write import stored_form, write_sharded
from oneshot.distributed.engine import gathered
from oneshot.distributed.runtime import Runtime, agree

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def save_checkpoint(
    runtime: Runtime,
    model: PreTrainedModel,
    origin: Origin,
    folder: Path,
    dtype: torch.dtype,
    *,
    stock: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a full Hugging Face checkpoint, every rank its own ranges. Collective.

    Args:
        origin: where the model comes from: what lies beside its weights goes along
        folder: replaced as a whole, by a rename, once everything is written
        dtype: of the weights in the file
        stock: gather everything on rank 0 and let transformers write, as is done anyway where what it stores are no
            ranges of the model's tensors
        beside: writes further files into the folder, on rank 0, before it appears and before the weights are in it
    """
    if not stock and stored_form(model) is not None:
        write_sharded(runtime, model, origin, folder, dtype, beside=beside)
    else:
        _save_gathered(runtime, model, origin, folder, dtype, beside)


def _save_gathered(
    runtime: Runtime,
    model: PreTrainedModel,
    origin: Origin,
    folder: Path,
    dtype: torch.dtype,
    beside: Callable[[Path], None] | None,
) -> None:
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(runtime, [parameter]):
            if runtime.is_main:
                state[name] = parameter.detach().to(dtype).cpu().clone()
    with replacing(runtime, folder) as temporary, agree(runtime, f"writing the checkpoint {folder}"):
        if runtime.is_main:
            buffers = dict(model.named_buffers())
            state |= {name: buffers[name].cpu() for name in model.state_dict() if name in buffers}
            with naming(temporary):
                if beside is not None:  # first: a marker is there before the weights are
                    beside(temporary)
                model.save_pretrained(temporary, state_dict=state)
                write_beside(model, origin, temporary, dtype)
            list_tensors(temporary)


def save_adapter(
    runtime: Runtime, model: Any, origin: Origin, folder: Path, beside: Callable[[Path], None] | None = None
) -> None:
    """Write a PEFT model's adapter, gathering no more than the adapter, and read it back. Collective.

    Args:
        origin: where the tokenizer comes from
        beside: as of ``save_checkpoint``
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gathered(runtime, [parameter]):
                state[name] = parameter.detach().cpu().clone()
    assert state, "an empty adapter must never be written"
    assert all(t.numel() > 0 for t in state.values()), "an empty factor must never be written"
    with replacing(runtime, folder) as temporary, agree(runtime, f"writing the adapter {folder}"):
        if runtime.is_main:
            with naming(temporary):
                if beside is not None:  # first: a marker is there before the weights are
                    beside(temporary)
                model.save_pretrained(temporary, state_dict=state)
                write_tokenizer(origin, temporary)
                if beside is not None:  # again: PEFT writes into the card
                    beside(temporary)
            read_adapter(temporary)
