"""Exports: a merged checkpoint, an adapter made of others, or the difference of two checkpoints; each with its card."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oneshot.checkpoint.adapters.carrier import in_form
from oneshot.checkpoint.disk.files import MARKER, find_weight, is_adapter, list_tensors, resolve, write_marker
from oneshot.checkpoint.disk.lock import locked
from oneshot.checkpoint.layout import FLOATS
from oneshot.checkpoint.loading.architecture import architecture_of
from oneshot.checkpoint.merging.exports import (
    check_base,
    check_out,
    check_space,
    is_measured,
    plan_for,
    read_given,
    refuse_degraded,
    why_derived_marked,
    why_marked,
)
from oneshot.checkpoint.merging.merge import merge
from oneshot.checkpoint.merging.new_adapter import NewAdapter, base_of, made_of, same_way_round, write_adapter
from oneshot.checkpoint.reads.digests import shared_fingerprint
from oneshot.checkpoint.reads.ranges import torch_dtype
from oneshot.checkpoint.writing.identity import DERIVED, UPDATE, same_base, store_identity, write_identity
from oneshot.checkpoint.writing.standing import (
    NF4,
    NF4_DOUBLE,
    ORIGINAL,
    PACKED,
    carry_standing,
    comes_from_degraded,
    mark_unmeasured,
    read_standing,
)
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError
from oneshot.patch.derive import Wanted, extracted, is_exact, layers_to_extract, lowered, summed
from oneshot.redact import without_secrets
from oneshot.report.card import adapter_card, merge_card, write_card
from oneshot.report.markdown import inline
from oneshot.report.verdict import EXACT
from oneshot.settings import RepairSettings

_RANK_EXPERTS = RepairSettings().rank_experts  # of an extracted patch, as of a repair


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        out: folder to write, which must not exist or be empty
        model: checkpoint to merge into, or to compare ``extract`` with; none makes one adapter of the given ones
        adapters: folders or Hub ids of PEFT LoRA adapters, which are summed
        weights: of each adapter in the sum; none: 1
        base: merge into the weights as they are, or as NF4 leaves them; none: as they are
        double_quant: with ``dequantized``, whether the scales were quantized, too
        subtract: take the adapters out of a merged checkpoint
        rank: of the adapter to write
        rank_experts: of its factors of a mixture's experts; none: with ``extract`` the default, else ``rank``
        expert_form: which of PEFT's two forms those are written in: single experts (2d) or all together (3d); none:
            that of the first adapter which has some, with ``extract`` that of the model's class in vLLM
        extract: write what this checkpoint has more than ``model`` as an adapter
        force: use patches that belong to another model
        trust_remote_code: run the model's own Python code to build its config
    """

    out: Path
    model: str | None = None
    adapters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    base: Literal["original", "dequantized"] | None = None
    double_quant: bool = False
    subtract: bool = False
    rank: int | None = None
    rank_experts: int | None = None
    expert_form: Literal["2d", "3d"] | None = None
    extract: str | None = None
    force: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.expanduser())


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder, what it holds, and the card's facts (``oneshot_export.json``) and sentences."""

    folder: Path
    kind: Literal["checkpoint", "adapter"]
    facts: dict[str, Any]
    lines: list[str]


def check_request(request: ExportRequest) -> None:
    """Raise UserError for wishes that do not go together; reads no file."""
    for name, rank in (("rank", request.rank), ("rank_experts", request.rank_experts)):
        if rank is not None and rank < 1:
            raise UserError(f"--{name} is {rank}: give 1 or more.")
    changing = request.rank or request.rank_experts or request.expert_form
    if request.extract:
        merging = {
            "adapter": request.adapters, "weight": request.weights, "base": request.base,
            "double_quant": request.double_quant, "subtract": request.subtract,
        }  # fmt: skip
        given = [f"--{name}" for name, value in merging.items() if value]
        if given:
            raise UserError(f"--extract makes a patch from two checkpoints: leave {given[0]} out.")
        if not request.model or not request.rank:
            raise UserError("--extract needs --model, the checkpoint that the patch is for, and --rank.")
    elif not request.adapters:
        raise UserError("Nothing to export: give --adapter, or --extract with --model.")
    elif request.model and changing:
        name = "rank" if request.rank else "rank_experts" if request.rank_experts else "expert_form"
        raise UserError(f"--{name} is for adapters, and a merge has no {name}: leave --{name} or --model out.")
    elif not request.model and (request.base or request.double_quant or request.subtract):
        raise UserError("--base, --double_quant and --subtract are for a merge: give --model, the checkpoint.")
    elif not request.model and not changing and len(request.adapters) == 1 and not request.weights:
        raise UserError(
            "Nothing to do with one adapter alone: give --model to merge it, --rank to lower its rank, or "
            "--expert_form."
        )
    if request.weights and len(request.weights) != len(request.adapters):
        raise UserError(
            f"There are {len(request.adapters)} --adapter and {len(request.weights)} --weight: give one for each or "
            "none."
        )
    if any(not 0 < weight < float("inf") for weight in request.weights):
        raise UserError("Every --weight must be a number above 0; --subtract takes adapters out.")
    if request.double_quant and request.base != "dequantized":
        raise UserError("--double_quant says how the base was quantized: give it with --base dequantized.")


def export(runtime: Runtime, request: ExportRequest, command: str) -> Exported:
    """Write what is asked for, as a folder that appears when it is complete. Collective.

    Args:
        command: what made it, for the card

    Raises:
        UserError: the request is at odds with itself, with a checkpoint or with an adapter, or ``out`` cannot be
            written; nothing is left behind
    """
    check_request(request)
    with locked(runtime, request.out):
        return _export(runtime, request, command)


def _export(runtime: Runtime, request: ExportRequest, command: str) -> Exported:
    if request.extract and request.model and request.rank:
        return _extract(runtime, request, command, request.extract, request.model, request.rank)
    if request.model:
        return _merge(runtime, request, command, request.model)
    return _combine(runtime, request, command)


def _merge(runtime: Runtime, request: ExportRequest, command: str, model: str) -> Exported:
    """Add the adapters to a checkpoint, or take them out of it."""
    base, given = _checkpoint(model, "model"), read_given(request.adapters, request.weights, merging=True)
    check_out(request.out, [base, *(one.folder for one in given)])
    with agree(runtime, f"checking {base}"):
        if runtime.is_main and not request.force:
            check_base(base, given, subtract=request.subtract)
    sign = -1.0 if request.subtract else 1.0
    plan = plan_for(
        runtime,
        base,
        given,
        sign=sign,
        through_nf4=request.base == "dequantized",
        double_quant=request.double_quant,
        trust_remote_code=request.trust_remote_code,
    )
    if plan.packed and request.base:
        raise UserError(
            f"{base} is itself in NF4, and is dequantized as it is read: leave --base out, or give the checkpoint "
            "from before its quantization."
        )
    check_space(request.out, plan.nbytes)
    form = PACKED if plan.packed else ORIGINAL if not plan.quantized else NF4_DOUBLE if plan.double_quant else NF4
    marked = why_marked(base, given, subtract=request.subtract, form=form)
    known = {"base": _name(model, base), "base_fingerprint": shared_fingerprint(runtime, base)}
    facts, lines = merge_card(plan, given, **known, subtract=request.subtract, marked=marked)
    facts["command"] = command

    lifted = not marked and any(comes_from_degraded(folder) for folder in (base, *(one.folder for one in given)))

    def beside(folder: Path) -> None:
        write_card(folder, "Merged checkpoint", facts, lines)
        if lifted:  # half of it is not what was measured
            mark_unmeasured(folder, facts["base"])
        if marked:  # after the card, in whose place it warns; before the weights
            done = {("subtracted" if request.subtract else "added"): request.adapters}
            about = without_secrets({**done, "base": facts["base"], "why": marked})
            write_marker(folder, about, " ".join(map(inline, without_secrets(lines))))

    def last(folder: Path) -> None:
        if lifted:
            write_card(folder, "Merged checkpoint", facts, lines)
            (folder / MARKER).unlink()

    with phase("merge"):
        merge(runtime, plan, request.out, beside, last)
    return Exported(request.out, "checkpoint", facts, lines)


def _combine(runtime: Runtime, request: ExportRequest, command: str) -> Exported:
    """Write one adapter from the given ones: their sum, of lower rank if asked for."""
    import torch

    given = read_given(request.adapters, request.weights)
    check_out(request.out, [one.folder for one in given])
    identity = None if request.force else same_base([(one.folder, one.identity) for one in given])
    adapters = [one.adapter for one in given]
    base, made = base_of(adapters, trust_remote_code=request.trust_remote_code)
    adapters = same_way_round(adapters, made)
    total = summed([(one.folder, adapter.update, one.weight) for one, adapter in zip(given, adapters)])
    dtypes = {one.adapter.dtype for one in given}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if request.rank is None and request.rank_experts is None and not is_exact(total, dtype):
        dtype = torch.float32  # a bf16 adapter times its scaling need not be one
    update, left = lowered(total, request.rank, dtype, request.rank_experts)
    new = made_of(NewAdapter(update, dtype, base, []), adapters, made, request.expert_form)
    whole = all(part.relative <= EXACT for part in left.values())
    same = whole and is_measured(given) and not new.unchecked
    new = dataclasses.replace(new, marked="" if same else why_derived_marked([one.folder for one in given]))
    facts, lines = adapter_card("sum", given, left, {}, base=base, marked=new.marked)
    facts["command"] = command
    lines += new.unchecked
    if same:
        identity = given[0].identity
        lines.append(f"The same update as {given[0].folder} in another form: its verdict is this one's too.")

    def beside(folder: Path) -> None:
        write_card(folder, "LoRA adapter", facts, lines)
        if identity is not None:
            store_identity(folder, identity)
        if same:
            carry_standing(given[0].folder, folder)

    write_adapter(runtime, request.out, new, given[0].folder, beside)
    return Exported(request.out, "adapter", facts, lines)


def _extract(runtime: Runtime, request: ExportRequest, command: str, extract: str, model: str, rank: int) -> Exported:
    """Write the difference of two checkpoints as an adapter."""
    import torch

    changed, base = _checkpoint(extract, "changed checkpoint"), _checkpoint(model, "model")
    check_out(request.out, [changed, base])
    refuse_degraded(changed)
    tensors = list_tensors(base)
    made = architecture_of(base, tensors, trust_remote_code=request.trust_remote_code)
    if not made.patchable:
        raise UserError(f"{base} has no linear layer that a patch could change.")
    first = find_weight(tensors, made.patchable[0])
    assert first is not None
    in_full = tensors[first].dtype in FLOATS  # else the numbers that it stands for are compared in fp32
    dtype = torch_dtype(tensors[first], first) if in_full else torch.float32
    layers = layers_to_extract(made.model, made.patchable)
    wanted = Wanted(layers, rank, request.rank_experts or _RANK_EXPERTS, made.model)
    update, left, others = extracted(runtime, changed, base, wanted, dtype)
    name = _name(model, base)
    marked = why_derived_marked([changed, base])
    facts, lines = adapter_card("difference", [], left, others, base=name, marked=marked)
    facts |= {"changed": _name(extract, changed), "command": command}

    def beside(folder: Path) -> None:
        write_card(folder, "LoRA adapter", facts, lines)
        repaired = any(
            read_standing(each) is not None for each in (changed, base)
        )  # then it holds a repair, or undoes one
        kind = DERIVED if repaired else UPDATE
        write_identity(folder, base, kind=kind, base=name, model=made.model)

    held = [in_form(update, made.model, request.expert_form)] if request.expert_form else update
    new = NewAdapter(held, dtype, name, list(made.linears), marked, made.model)
    write_adapter(runtime, request.out, new, base, beside)
    return Exported(request.out, "adapter", facts, lines)


def _checkpoint(source: str, what: str) -> Path:
    """The folder of a full checkpoint, a Hub id included."""
    folder = resolve(source, what)
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter where a full checkpoint belongs: give it with --adapter.")
    return folder


def _name(source: str, folder: Path) -> str:
    """How a card names a checkpoint: a Hub id stays one, a folder is said in full."""
    return str(folder.resolve()) if Path(source).expanduser().is_dir() else source
