"""What is checked before an export: the adapters, the folder to write, and what is safe to hand out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from oneshot.checkpoint.adapters.adapter import Adapter, read_adapter
from oneshot.checkpoint.adapters.bases import own_tokenizer
from oneshot.checkpoint.adapters.effective import Kinds, kinds_of, read_effective, refuse
from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, MARKER, is_adapter, is_degraded, resolve
from oneshot.checkpoint.disk.seal import digests
from oneshot.checkpoint.loading.around import on_base, swapped_on
from oneshot.checkpoint.merging.merge_effective import merged_by_peft, plan_effective
from oneshot.checkpoint.merging.merge_plan import MergePlan, adapter_terms, plan_merge
from oneshot.checkpoint.names import TOKENIZER
from oneshot.checkpoint.writing.identity import DERIVED, UPDATE, Identity, check_identity, read_identity
from oneshot.checkpoint.writing.standing import (
    comes_from_degraded,
    read_standing,
    why_not_as_measured,
    why_not_measured,
)
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime
from oneshot.errors import UserError
from oneshot.reading import read_object


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter that the user named: its folder, what it holds, its weight in the sum, and what it belongs to.

    One of ``kinds`` that are more than a LoRA has no update of its own: only a merge can be made of it.
    """

    folder: Path
    adapter: Adapter
    weight: float
    identity: Identity | None
    kinds: Kinds = field(default_factory=Kinds)


@phase("read")
def read_given(sources: list[str], weights: list[float], *, merging: bool = False) -> list[GivenAdapter]:
    """Read the adapters to export.

    Args:
        weights: one for each, or none
        merging: they go into a checkpoint, as adapters of any kind can

    Raises:
        UserError: one is no LoRA adapter, is marked as safety-degraded, or is not finite
    """
    import torch

    found = []
    for source, weight in zip(sources, weights or [1.0] * len(sources)):
        folder = resolve(source, "adapter")
        if not is_adapter(folder):
            raise UserError(f"{folder} holds no adapter_config.json: give the folder of a PEFT LoRA adapter.")
        refuse_degraded(folder)
        kinds = kinds_of(folder) if merging else Kinds()
        if kinds.every:
            if kinds.never:
                raise refuse(folder, kinds.never)
            config = read_object(folder / ADAPTER_CONFIG)
            found.append(
                GivenAdapter(folder, Adapter({}, {}, {}, config, torch.float32), weight, read_identity(folder), kinds)
            )
            continue
        adapter = read_adapter(folder)
        for module, factors in adapter.stored.items():
            if not (factors.b.isfinite().all() and factors.a.isfinite().all()):
                raise UserError(f"The adapter {folder} holds NaN or infinity in {module}: train or save it again.")
        found.append(GivenAdapter(folder, adapter, weight, read_identity(folder)))
    return found


def plan_for(
    runtime: Runtime, base: Path, given: list[GivenAdapter], *, sign: float, through_nf4: bool = False,
    double_quant: bool = False, trust_remote_code: bool = False,
) -> MergePlan:  # fmt: skip
    """Work out the merge of adapters of any kind into a checkpoint, and whose tokenizer goes along.

    That is the adapters' own, if those that have one have the same; what they are taken out of keeps its tokenizer.

    Args:
        sign: 1, or -1 to take them out of it
        through_nf4, double_quant: as of ``plan_merge``

    Raises:
        UserError: one is more than a LoRA and not alone, at weight 1; or as of ``plan_merge``
    """
    plan = _planned(
        runtime, base, given, sign=sign,
        through_nf4=through_nf4, double_quant=double_quant, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    own = [one.folder for one in given if own_tokenizer(one.folder) is not None]
    alike = own and all(digests(folder, TOKENIZER) == digests(own[0], TOKENIZER) for folder in own)
    return replace(plan, tokenizer=own[0] if alike and sign > 0 else None)


def _planned(
    runtime: Runtime, base: Path, given: list[GivenAdapter], *, sign: float, through_nf4: bool, double_quant: bool,
    trust_remote_code: bool,
) -> MergePlan:  # fmt: skip
    more = next((one for one in given if one.kinds.every), None)
    if more is None:
        settled = [on_base(one.adapter, base, trust_remote_code=trust_remote_code) for one in given]
        parts = [
            (f"The adapter {one.folder}", adapter_terms(adapter, sign * one.weight))
            for one, adapter in zip(given, settled)
        ]
        return plan_merge(
            base, parts, through_nf4=through_nf4, double_quant=double_quant, trust_remote_code=trust_remote_code
        )
    kinds = ", ".join(more.kinds.every)
    if len(given) > 1 or sign * more.weight != 1.0:
        raise UserError(
            f"{more.folder} is more than a LoRA of linear layers ({kinds}), which has no sum, no weight and no way "
            "back: merge it alone, then the others into the result."
        )
    if not more.kinds.by_peft:
        effective = read_effective(more.folder, swapped_on(base, trust_remote_code=trust_remote_code))
    elif runtime.world_size > 1 or through_nf4:
        raise UserError(
            f"{more.folder} ({kinds}) is merged by PEFT, in the memory of one process: start oneshot export without a "
            "launcher, and leave --base out."
        )
    else:
        effective = merged_by_peft(base, more.folder, trust_remote_code=trust_remote_code)
    return plan_effective(
        base, more.folder, effective,
        through_nf4=through_nf4, double_quant=double_quant, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def refuse_degraded(folder: Path) -> None:
    """Raise UserError for a checkpoint or adapter that carries the marker of a harmful fine-tune."""
    if not is_degraded(folder):
        return
    identity = read_identity(folder)
    instead = (
        "it was made of a repair's patch, and nobody has measured it; ask the repair for such a patch, a smaller rank "
        "with --repair.rank"
        if identity is not None and identity.kind == DERIVED
        else "repair it with oneshot repair, and export the repair"
    )
    raise UserError(f"{folder} is marked as safety-degraded ({MARKER}) and is not exported: {instead}.")


def why_marked(base: Path, given: list[GivenAdapter], *, subtract: bool, form: str) -> str:
    """Return why what a merge writes must carry the marker, as a clause; "" where it need not.

    Of what comes from a safety-degraded model one thing goes without: a patch as its repair has measured it and found
    it good, whole, at weight 1, on its own base.

    Args:
        form: in which the base's weights are taken, see ``Standing``
    """
    if subtract and any(one.identity is not None and one.identity.kind != UPDATE for one in given):
        return "a safety repair was taken out"
    undoes = [one.folder for one in given if one.identity is not None and one.identity.kind == DERIVED]
    if undoes and read_standing(base) is not None:
        return f"{undoes[0]} was made of a safety repair, and {base} is a repaired model: nobody measured the two"
    sources = [folder for folder in (base, *(one.folder for one in given)) if comes_from_degraded(folder)]
    if not sources:
        return ""
    if subtract:
        return f"something was taken out, and {sources[0]} comes from a safety-degraded model"
    if len(given) > 1:
        return f"several adapters were added, and {sources[0]} comes from a safety-degraded model"
    if given[0].weight != 1.0:
        return f"{given[0].folder} was added at weight {given[0].weight:g}, and was measured at 1"
    return why_not_as_measured(given[0].folder, base, form)


def is_measured(given: list[GivenAdapter]) -> bool:
    """Return whether what is given is one patch as its repair has measured it and found it good, at weight 1."""
    return len(given) == 1 and given[0].weight == 1.0 and not why_not_measured(given[0].folder)


def why_derived_marked(folders: list[Path]) -> str:
    """Return why an adapter that is made of other ones, or of checkpoints, must carry the marker; "" where it need not.

    Args:
        folders: what it is made of
    """
    sources = [folder for folder in folders if comes_from_degraded(folder)]
    return f"it was not measured, and {sources[0]} comes from a safety-degraded model" if sources else ""


def check_base(base: Path, given: list[GivenAdapter], *, subtract: bool) -> None:
    """Raise UserError if a patch says that it belongs to another checkpoint; plain adapters say nothing."""
    for one in given:
        check_identity(one.folder, base, applied=subtract)


def check_out(out: Path, inputs: list[Path]) -> None:
    """Raise UserError if ``out`` holds something, or lies in an input folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"The output {out} exists and is not empty: name a new folder, or remove it.")
    place = out.resolve()
    for folder in (path.resolve() for path in inputs):
        if place == folder or folder in place.parents:
            raise UserError(f"The output {out} lies in the input {folder}: name a folder elsewhere.")


def check_space(out: Path, nbytes: int) -> None:
    """Raise UserError if the disk of ``out`` has less free than ``nbytes``."""
    parent = next(path for path in out.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise UserError(
            f"The result takes {nbytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: make room, or name a "
            "folder on another disk."
        )
