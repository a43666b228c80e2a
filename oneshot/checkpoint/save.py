"""Write checkpoints and adapters from a model that may be partitioned over ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapter import Update, read_adapter
from oneshot.checkpoint.files import list_tensors
from oneshot.distributed.engine import gathered
from oneshot.distributed.runtime import Runtime, barrier

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    runtime: Runtime, model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, update: Update | None = None
) -> None:
    """Write a full Hugging Face checkpoint; rank 0 writes, one gathered parameter after the other. Collective.

    Args:
        folder: replaced as a whole, by a rename, once everything is written
        dtype: of the weights in the file
        update: added to the weights on the way (a merge); the model itself stays as it is
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(runtime, [parameter]):
            if runtime.is_main:
                whole = parameter.detach().float() if update else parameter.detach()
                factors = (update or {}).get(name.removesuffix(".weight"))
                if factors is not None:
                    whole = whole + factors.b.to(whole.device) @ factors.a.to(whole.device)
                state[name] = whole.to(dtype).cpu().clone()
    if runtime.is_main:
        state |= {
            name: buffer.cpu()
            for name, buffer in model.state_dict().items()
            if name not in state and _is_buffer(model, name)
        }
        with _replacing(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            _state_dtype(temporary / "config.json", dtype)
            tokenizer.save_pretrained(temporary)
            list_tensors(temporary)
    barrier(runtime)


def save_adapter(runtime: Runtime, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a PEFT model's adapter, gathering no more than the adapter, and read it back. Collective."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gathered(runtime, [parameter]):
                state[name] = parameter.detach().cpu().clone()
    assert state, "an empty adapter must never be written"
    assert all(t.numel() > 0 for t in state.values()), "an empty factor must never be written"
    if runtime.is_main:
        with _replacing(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            read_adapter(temporary)
    barrier(runtime)


class _replacing:
    """Write into a temporary sibling, then take the folder's place by rename, so that no half folder is ever seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name(folder.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        old = self.folder.with_name(self.folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        try:
            os.replace(self.temporary, self.folder)
        except OSError:
            if old.exists():
                os.replace(old, self.folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _state_dtype(config: Path, dtype: torch.dtype) -> None:
    """Have the config state the dtype of the file: transformers wrote that of the model in memory."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_buffer(model: Any, name: str) -> bool:
    return name in dict(model.named_buffers())
