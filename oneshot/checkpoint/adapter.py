"""PEFT LoRA adapter files, in which low-rank updates of linear layers travel."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.files import PICKLED_ADAPTER, read_header
from oneshot.checkpoint.folders import naming
from oneshot.checkpoint.names import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.checkpoint.seal import ADAPTER, check_sealed
from oneshot.checkpoint.update import Factors, Update, scaled
from oneshot.errors import UserError
from oneshot.reading import first_match, limited, read_object, reading
from oneshot.redact import redacted, without_secrets

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
_PEFT_ALPHA = 8  # PEFT's default, where a config names none
_PATTERN_SECONDS = 5.0  # for all modules of a model together, of which there are thousands
# LoRA initializations under which PEFT also replaces the base's weights when it loads the adapter
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        UserError: not a LoRA, a cut-off file, tensors that are no plain LoRA factors (DoRA, biases, embeddings,
            modules_to_save), which no low-rank update of a linear layer can express, or a LoRA that is more than its
            factors (its initialization changes the base, or it is active only after certain tokens)
    """
    from safetensors.torch import load_file

    check_sealed(folder, ADAPTER)
    config = read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {config.get('peft_type')} adapter: oneshot works on LoRA adapters.")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_CHANGES_BASE) or config.get("alora_invocation_tokens"):
        what = f"init_lora_weights {init}" if init.startswith(_CHANGES_BASE) else "alora_invocation_tokens"
        raise UserError(
            f"{folder / ADAPTER_CONFIG} has {what}, so the adapter is more than an update of its base: merge it with "
            "PEFT first and give the merged checkpoint."
        )
    path = folder / ADAPTER_TENSORS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds its factors as adapter_model.bin alone, a pickle, which can run code as it is read, so it "
            f"is not; where you trust its source, convert it once: {PICKLED_ADAPTER.format(folder=folder)}."
        )
    read_header(path)
    with reading(path, "copy it again"):
        tensors = load_file(path)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(A|B)\.weight", key)
        if match is None or tensor.ndim != 2:
            raise UserError(
                f"{path} holds {key}, which is not a plain LoRA factor of a linear layer: merge the adapter with "
                "PEFT first and give the merged checkpoint."
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    update: Update = {}
    stored: Update = {}
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items() if "A" in pair}
    scaling = _scalings(config, ranks, folder / ADAPTER_CONFIG)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{path} holds only one factor of {module}: the adapter is incomplete, save it again.")
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
    folder: Path, update: Update, linears: list[str], base: str, dtype: torch.dtype, parameters: Collection[str] = ()
) -> None:
    """Write an update as a PEFT LoRA adapter on ``base``, then read it back and compare.

    All modules get the same rank (the largest, zero-padded), as servers expect, and scaling 1.

    Args:
        folder: created if missing; written by one rank only
        update: what to add to the base
        linears: names of all linear layers of the model, to choose short target names that match exactly these
        dtype: of the stored factors
        parameters: those of the modules whose weight PEFT is told by its own name (``target_parameters``)
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


def _scalings(config: dict[str, Any], ranks: dict[str, int], path: Path) -> dict[str, float]:
    """PEFT's scaling of every module: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA.

    Args:
        ranks: by module; one of 0 has none
        path: of the config, for messages
    """
    alphas, patterns = config.get("lora_alpha", _PEFT_ALPHA), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path} has an alpha_pattern that is no JSON object: restore it from its source.")
    for name, alpha in (
        ("lora_alpha", alphas),
        *((f"alpha_pattern {key[:80]!r}", one) for key, one in patterns.items()),
    ):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise UserError(f"{path} has {name} {alpha!r}, which is no number: restore it from its source.")
    found = {}
    with limited(f"Matching the alpha_pattern of {path}", seconds=_PATTERN_SECONDS):
        for module, rank in ranks.items():
            own = first_match(patterns, module, path)
            alpha = float(alphas if own is None else own)
            if rank:
                found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


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
