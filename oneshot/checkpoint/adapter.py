"""PEFT LoRA adapter files, in which low-rank updates of linear layers travel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.effective import PREFIX as PREFIX
from oneshot.checkpoint.effective import factor_of, kinds_of, refuse
from oneshot.checkpoint.folders import naming
from oneshot.checkpoint.names import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.checkpoint.scaling import scalings
from oneshot.checkpoint.seal import ADAPTER, check_sealed
from oneshot.checkpoint.update import Factors, Update, scaled
from oneshot.errors import UserError
from oneshot.reading import read_object, reading
from oneshot.redact import redacted, without_secrets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter as read: its update of the base model (scaling included) and how PEFT scales each module.

    ``stored`` are the factors without the scaling, for who must multiply in PEFT's order to get PEFT's bits.
    """

    update: Update
    stored: Update
    scaling: dict[str, float]
    config: dict[str, Any]
    dtype: torch.dtype


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA adapter; factors are fp32 on the CPU, PEFT's scaling folded into ``b``.

    Raises:
        UserError: a cut-off file, or an adapter that is more than a low-rank update of linear layers, see
            ``oneshot.checkpoint.effective``
    """
    from safetensors.torch import load_file

    check_sealed(folder, ADAPTER)
    config = read_object(folder / ADAPTER_CONFIG)
    if more := kinds_of(folder).every:
        base = config.get("base_model_name_or_path")
        raise refuse(folder, more, base if isinstance(base, str) and base else None)
    path = folder / ADAPTER_TENSORS
    with reading(path, "copy it again"):
        tensors = load_file(path)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        factor = factor_of(key)
        assert factor is not None, "kinds_of() has found every other"
        pairs.setdefault(factor[0], {})[factor[1]] = tensor
    update: Update = {}
    stored: Update = {}
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair and pair["A"].ndim}
    scaling = scalings(config, ranks, folder / ADAPTER_CONFIG)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{path} holds only one factor of {module}: the adapter is incomplete, save it again.")
        if any(one.ndim != 2 for one in pair.values()):
            raise UserError(f"{path} holds factors of {module} that are no matrices: save the adapter again.")
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank or rank == 0:
            raise UserError(f"{path}: the factors of {module} do not fit ({pair['B'].shape}, {pair['A'].shape}).")
        stored[module] = Factors(pair["B"].float(), pair["A"].float())
        plain = scaling[module] == 1.0
        update[module] = stored[module] if plain else scaled(stored[module], scaling[module])
    if not update:
        raise UserError(f"{path} holds no LoRA factors: the adapter is empty, save it again.")
    return Adapter(update, stored, scaling, config, next(iter(tensors.values())).dtype)


def write_patch(
    folder: Path,
    update: Update,
    linears: list[str],
    base: str,
    dtype: torch.dtype,
    parameters: Collection[str] = (),
    commit: str | None = None,
) -> None:
    """Write an update as a PEFT LoRA adapter on ``base``, then read it back and compare.

    All modules get the same rank (the largest, zero-padded), as servers expect, and scaling 1.

    Args:
        folder: created if missing; written by one rank only
        update: what to add to the base
        linears: names of all linear layers of the model, to choose short target names that match exactly these
        dtype: of the stored factors
        parameters: those of the modules whose weight PEFT is told by its own name (``target_parameters``)
        commit: of the base, where that is a Hub id
    """
    from peft import LoraConfig

    rank = max(factors.rank for factors in update.values())
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_names(sorted(update.keys() - set(parameters)), linears),
        target_parameters=[f"{name}.weight" for name in sorted(parameters)] or None,
        base_model_name_or_path=redacted(base),
        revision=commit,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for module, factors in update.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = _padded(factors.a, rank, 0).to(dtype).cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = _padded(factors.b, rank, 1).to(dtype).cpu().contiguous()
    _save_checked(folder / ADAPTER_TENSORS, tensors)


def write_repaired_adapter(folder: Path, adapter: Adapter, update: Update) -> None:
    """Write ``update`` in the place of the adapter's own: same config, rank, scaling, tensor names and dtype.

    Args:
        update: per module of the adapter, factors of at most the adapter's rank, scaling not yet divided out
    """
    import json

    tensors = {}
    for module, factors in update.items():
        rank = adapter.update[module].rank
        b, a = _padded(factors.b / adapter.scaling[module], rank, 1), _padded(factors.a, rank, 0)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(adapter.dtype).cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(adapter.dtype).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = without_secrets(adapter.config)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _save_checked(folder / ADAPTER_TENSORS, tensors)


def _save_checked(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    assert tensors, "an empty adapter must never be written"
    assert all(t.numel() > 0 for t in tensors.values()), "an empty factor must never be written"
    with naming(path, sum(t.nbytes for t in tensors.values())):
        save_file(tensors, path, metadata={"format": "pt"})
    again = load_file(path)
    if set(again) != set(tensors) or not all(torch.equal(again[k], t) for k, t in tensors.items()):
        raise OSError(f"{path} does not read back as it was written: is the disk full or failing?")


def _padded(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = rank - tensor.shape[dim]
    if not missing:
        return tensor
    import torch

    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _target_names(modules: list[str], linears: list[str]) -> list[str]:
    """Return last name components where they match exactly ``modules`` among ``linears``, else full names."""
    endings = sorted({module.rsplit(".", 1)[-1] for module in modules})
    matched = [name for name in linears if name.rsplit(".", 1)[-1] in endings]
    return endings if sorted(matched) == modules else modules
