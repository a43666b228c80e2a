"""PEFT LoRA adapter files, in which low-rank updates of linear layers travel."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier import APART, Carried, carried, expert_of, model_path, padded, sizes_of
from oneshot.checkpoint.adapters.carrier_read import Uncarried, is_by_weight, uncarried
from oneshot.checkpoint.adapters.effective import PREFIX as PREFIX
from oneshot.checkpoint.adapters.effective import factor_of, kinds_of, refuse
from oneshot.checkpoint.adapters.update import Factors, Update, scaled, transposed
from oneshot.checkpoint.disk.folders import naming
from oneshot.checkpoint.disk.seal import ADAPTER, check_sealed
from oneshot.checkpoint.names import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.errors import UserError
from oneshot.reading import read_object, reading
from oneshot.redact import redacted, without_secrets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter as read: its update of the base model (scaling included) and how PEFT scales each module.

    ``stored`` are the factors without the scaling, for who must multiply in PEFT's order to get PEFT's bits;
    ``experts`` says how the file holds those of fused experts, none where it has none; ``files`` what the file calls
    the modules that are no experts.
    """

    update: Update
    stored: Update
    scaling: dict[str, float]
    config: dict[str, Any]
    dtype: torch.dtype
    experts: Uncarried | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> frozenset[str]:
        """Modules that the config names by their weights (``target_parameters``), such as routers."""
        return frozenset(name for name in self.update if is_by_weight(name, self.config))


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA adapter; factors are fp32 on the CPU, PEFT's scaling folded into ``b``.

    Raises:
        UserError: a cut-off file, or an adapter that is more than a low-rank update of linear layers, see
            ``oneshot.checkpoint.adapters.effective``
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
    held: Update = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{path} holds only one factor of {module}: the adapter is incomplete, save it again.")
        if any(one.ndim != 2 for one in pair.values()):
            raise UserError(f"{path} holds factors of {module} that are no matrices: save the adapter again.")
        rank = pair["A"].shape[0]
        if pair["B"].shape[1] != rank or rank == 0:
            raise UserError(f"{path}: the factors of {module} do not fit ({pair['B'].shape}, {pair['A'].shape}).")
        held[module] = Factors(pair["B"].float(), pair["A"].float())
    if not held:
        raise UserError(f"{path} holds no LoRA factors: the adapter is empty, save it again.")
    read = uncarried(held, config, folder / ADAPTER_CONFIG)
    return Adapter(
        _scaled(read.stored, read.scaling), read.stored, read.scaling, config, next(iter(tensors.values())).dtype,
        read if read.form else None,
        {model_path(module): module for module in held if model_path(module) in read.stored},
    )  # fmt: skip


def _scaled(stored: Update, scaling: Mapping[str, float]) -> Update:
    return {name: one if scaling[name] == 1.0 else scaled(one, scaling[name]) for name, one in stored.items()}


def is_settled(adapter: Adapter) -> bool:
    """Return whether it is known which way round the factors of experts are: of one projection alone no file tells."""
    return adapter.experts is None or adapter.experts.swapped is not None


def settled(adapter: Adapter, *, swapped: bool) -> Adapter:
    """Return an adapter with the factors of experts the way round that its base takes them, where that is not known.

    Args:
        swapped: see ``oneshot.checkpoint.adapters.carrier.swapped_in``
    """
    read = adapter.experts
    if read is None or read.swapped is not None:
        return adapter
    turn = {name for name in read.stored if swapped and expert_of(name)}
    stored = {name: transposed(factors) if name in turn else factors for name, factors in read.stored.items()}
    experts = replace(read, stored=stored, swapped=swapped)
    return replace(adapter, update=_scaled(stored, adapter.scaling), stored=stored, experts=experts)


def write_patch(
    folder: Path,
    update: Update | Carried,
    linears: list[str],
    base: str,
    dtype: torch.dtype,
    parameters: Collection[str] = (),
    commit: str | None = None,
) -> None:
    """Write an update as a PEFT LoRA adapter on ``base``, then read it back and compare.

    All linear layers get the same rank (the largest, zero-padded), as servers expect, all fused experts theirs, and
    scaling 1.

    Args:
        folder: created if missing; written by one rank only
        update: what to add to the base; of fused experts in the form that is to be written, else in 3-D
        linears: names of all linear layers of the model, to choose short target names that match exactly these
        dtype: of the stored factors
        parameters: those of the modules whose weight PEFT is told by its own name (``target_parameters``)
        commit: of the base, where that is a Hub id
    """
    from peft import LoraConfig

    held = update if isinstance(update, Carried) else carried(update)
    plain = held.linears
    rank = max((factors.rank for factors in plain.values()), default=0)
    ranks, pattern = _rank_fields(held, rank)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=ranks,
        lora_alpha=ranks,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=[*target_names(sorted(plain.keys() - set(parameters)), linears), *held.modules],
        target_parameters=[*(f"{name}.weight" for name in sorted(parameters)), *held.parameters] or None,
        base_model_name_or_path=redacted(base),
        revision=commit,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for module, factors in held.update.items():
        whole = padded(factors, rank) if module in plain else factors
        tensors[f"{PREFIX}{module}.lora_A.weight"] = whole.a.to(dtype).cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = whole.b.to(dtype).cpu().contiguous()
    _save_checked(folder / ADAPTER_TENSORS, tensors)


def _rank_fields(held: Carried, rank: int) -> tuple[int, dict[str, int]]:
    """The config's rank, and the patterns of what has another one.

    Args:
        rank: of the linear layers, 0 where there are none
    """
    if not held.form:
        return rank, {}
    if held.form != APART:
        # always: of a gate_proj beside it PEFT makes a pattern of its own, with twice the rank, which comes after ours
        return rank or max(held.ranks.values()), {rf"experts\.{name}": own for name, own in held.ranks.items()}
    first = max(held.ranks.values())  # from which PEFT works out the rank of what it fuses
    ends = sorted({re.escape(".".join(name.split(".")[-2:])) for name in held.linears})
    return first, {rf"(?:{'|'.join(ends)})(?:\.weight)?": rank} if rank not in (0, first) else {}


def write_repaired_adapter(folder: Path, adapter: Adapter, update: Update) -> None:
    """Write ``update`` in the place of the adapter's own: same config, rank, scaling, tensor names and dtype.

    Args:
        update: per module of the adapter, factors of at most the adapter's rank, scaling not yet divided out
    """
    import json

    # where a scaling is 0 (lora_alpha, alpha_pattern), so is the update
    scales = {name: adapter.scaling[name] or 1.0 for name in update}
    unscaled = {name: Factors(factors.b / scales[name], factors.a) for name, factors in update.items()}
    held = _as_read(adapter, unscaled)
    tensors = {}
    for name, factors in held.items():
        module = adapter.files.get(name, name)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = factors.a.to(adapter.dtype).cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = factors.b.to(adapter.dtype).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = without_secrets(adapter.config)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _save_checked(folder / ADAPTER_TENSORS, tensors)


def _as_read(adapter: Adapter, update: Update) -> Update:
    """An update under the names of an adapter's file, of the ranks there."""
    read = adapter.experts
    if read is None:
        return {name: padded(factors, adapter.update[name].rank) for name, factors in update.items()}
    mine = {name: factors for name, factors in adapter.update.items() if expert_of(name)}
    nothing = {name: scaled(factors, 0.0) for name, factors in mine.items() if name not in update}
    held = carried({**update, **nothing}, read.form, sizes_of(mine), read.names, read.ranks, swapped=bool(read.swapped))
    own = {name: padded(factors, adapter.update[name].rank) for name, factors in held.linears.items()}
    return {**held.update, **own}


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


def target_names(modules: list[str], linears: list[str]) -> list[str]:
    """Return last name components where they match exactly ``modules`` among ``linears``, else full names."""
    endings = sorted({module.rsplit(".", 1)[-1] for module in modules})
    matched = [name for name in linears if name.rsplit(".", 1)[-1] in endings]
    return endings if sorted(matched) == modules else modules
