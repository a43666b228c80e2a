"""What a merge of adapters into a checkpoint is to write, worked out and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.checkpoint.adapters.adapter import Adapter
from oneshot.checkpoint.adapters.carrier import expert_of
from oneshot.checkpoint.adapters.experts import bare_matrices, fused_experts
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import TensorEntry, find_weight, list_tensors
from oneshot.checkpoint.layout import FLOATS, tensor_bytes
from oneshot.checkpoint.loading.architecture import Architecture, architecture_of
from oneshot.checkpoint.quantized.dequantize import Packed, packed_weights
from oneshot.checkpoint.reads.manifest import Pieces, read_pieces
from oneshot.checkpoint.writing.beside import Changes, carried
from oneshot.checkpoint.writing.merge_experts import (
    StoredExperts,
    Term,
    by_layer,
    expert_terms,
    experts_in,
    quantized_experts,
)
from oneshot.checkpoint.writing.write import MAX_SHARD_BYTES, Slot, plan_shards
from oneshot.errors import UserError

if TYPE_CHECKING:
    import torch

_MERGED_COST = 3  # of a tensor that is computed, against one of its size that is copied
_UNPACKED = "BF16"  # dtype of what bitsandbytes had packed


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor beside summands of factors.

    Attributes:
        whole: what is in its place, before anything is added
        rows: (numbers of rows, the rows), in the place of those
        added: (m,), added to a bias
        norms: (m,), the norm that each row has in the end
    """

    whole: torch.Tensor | None = None
    rows: tuple[list[int], torch.Tensor] | None = None
    added: torch.Tensor | None = None
    norms: torch.Tensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge, checked before anything is written.

    Attributes:
        base: folder of the checkpoint
        tensors: as stored there, packed weights under their own name
        pieces: their checksums, where the checkpoint has them
        packed: those that bitsandbytes packed
        terms: stored weight -> what is added to it
        quantized: weights that pass through NF4 first
        fused: those among them that are a part of a parameter of ``experts`` -> the parameter
        double_quant: whether their scales are quantized, too
        slots: where each tensor goes
        headers: of each shard file that is written
        files: relative paths of what is carried over
        config: what of the base's config no longer holds
        changes: stored tensor -> what becomes of it beside the terms
        tokenizer: folder of the tokenizer that goes along; none: the base's own
        experts: where fused experts lie in its files, if anything is done with them
    """

    base: Path
    tensors: dict[str, TensorEntry]
    pieces: Pieces
    packed: dict[str, Packed]
    terms: dict[str, list[Term]]
    quantized: frozenset[str]
    double_quant: bool
    slots: dict[str, Slot]
    headers: dict[str, bytes]
    files: list[Path]
    config: Changes
    changes: dict[str, Change] = field(default_factory=dict)
    tokenizer: Path | None = None
    fused: dict[str, str] = field(default_factory=dict)
    experts: StoredExperts | None = None

    @property
    def changed(self) -> int:
        """How many tensors are others than the base's."""
        return len(self.terms.keys() | self.changes.keys())

    @property
    def nbytes(self) -> int:
        """Bytes that the result takes on disk."""
        weights = sum(tensor_bytes(slot.shape, slot.dtype) for slot in self.slots.values())
        return weights + sum(map(len, self.headers.values())) + sum((self.base / f).stat().st_size for f in self.files)


def adapter_terms(adapter: Adapter, weight: float) -> dict[str, Term]:
    """Return what an adapter adds to each module, times a weight."""
    return {module: Term(factors, adapter.scaling[module] * weight) for module, factors in adapter.stored.items()}


def plan_merge(
    base: Path,
    parts: list[tuple[str, dict[str, Term]]],
    *,
    through_nf4: bool = False,
    double_quant: bool = False,
    trust_remote_code: bool = False,
    max_bytes: int = MAX_SHARD_BYTES,
) -> MergePlan:
    """Work out the merge of several updates into a checkpoint.

    Args:
        parts: what to call an update in messages, and what it adds, by module
        through_nf4: every weight that QLoRA loads in 4 bits is first quantized and dequantized
        double_quant: the scales are quantized, too
        max_bytes: of a shard

    Raises:
        UserError: the checkpoint is not whole, is quantized in another way than bitsandbytes' NF4, has a manifest that
            does not fit it or a config that transformers cannot build; or an update changes what the checkpoint does
            not hold, holds in another shape or form, or shares with its embedding
    """
    every = list_tensors(base)
    pieces = read_pieces(base, every)
    packed = packed_weights(base, every)
    beside = {key for weight in packed.values() for key in weight.beside}
    tensors = {name: entry for name, entry in every.items() if name not in beside}
    architecture = architecture_of(base, tensors, trust_remote_code=trust_remote_code)
    shapes = {name: packed[name].shape if name in packed else entry.shape for name, entry in tensors.items()}
    dtypes = {name: _UNPACKED if name in packed else entry.dtype for name, entry in tensors.items()}
    terms: dict[str, list[Term]] = {}
    bare = bare_matrices(architecture.model)
    experts = experts_in(base, architecture.model) if through_nf4 and fused_experts(architecture.model) else None
    fused = quantized_experts(experts) if experts is not None else {}
    for what, added in parts:
        for module, term in by_layer(added, architecture.linears):
            if module in bare or (expert_of(module) and module not in architecture.linears):
                experts = experts or experts_in(base, architecture.model)
                summands = expert_terms(what, module, term, experts)
            else:
                name = _stored_weight(what, module, base, tensors, architecture)
                summands = [(name, fitting(what, module, term, name, shapes[name], base, architecture))]
            for name, summand in summands:
                terms.setdefault(name, []).append(summand)
                if dtypes[name] not in FLOATS:
                    raise UserError(f"{base} holds {name} as {dtypes[name]}, to which nothing can be added.")
    slots, headers = plan_shards(shapes, dtypes, max_bytes)
    quantized = architecture.quantized | fused.keys() if through_nf4 else frozenset()
    config = Changes("bfloat16" if packed else None, apart=architecture.untied)
    files = carried(base)
    if lost := [base / file for file in files if not (base / file).exists()]:
        raise UserError(f"{lost[0]} is a link to what is not there: remove it, or restore what it leads to.")
    return MergePlan(
        base, tensors, pieces, packed, terms, quantized, double_quant, slots, headers, files, config,
        fused=fused, experts=experts,
    )  # fmt: skip


def fitting(
    what: str, module: str, term: Term, name: str, shape: tuple[int, ...], base: Path, architecture: Architecture
) -> Term:
    """The term as it is added to the stored weight ``name``; its shape is checked."""
    factors = term.factors
    if name in architecture.transposed:
        factors = Factors(factors.a.T, factors.b.T)
    update = (factors.b.shape[0], factors.a.shape[1])
    if update != shape:
        raise UserError(
            f"{what} changes {module} by {update[0]} x {update[1]}, but {name} in {base} is "
            f"{' x '.join(map(str, shape))}: it belongs to another base model."
        )
    return Term(factors, term.scale)


def _stored_weight(
    what: str, module: str, base: Path, tensors: dict[str, TensorEntry], architecture: Architecture
) -> str:
    name = find_weight(tensors, module)
    if module in architecture.tied or name in architecture.tied:
        raise UserError(
            f"{what} changes {module}, which shares its weights with the "
            f"{'output head' if 'embed' in module else 'embedding'} in {base}: merging would change both, so train an "
            "adapter that leaves it out, or serve the adapter unmerged."
        )
    if name is None:
        raise UserError(
            f"{what} changes {module}, for which {base} holds no weight: it belongs to another architecture."
        )
    if name in architecture.others:
        raise UserError(
            f"{what} changes {module}, which is no linear layer of {base}, nor a router: check the base, or merge with "
            "PEFT."
        )
    if name in architecture.converted:
        raise UserError(
            f"{what} changes {module}, but {base} stores {name} in another form than transformers "
            "computes with: merge with PEFT instead."
        )
    return name


def shared_out(plan: MergePlan, world_size: int) -> list[list[str]]:
    """Return each rank's tensors, in the order of the files; the largest were first given to who had least to do."""
    cost = {name: tensor_bytes(slot.shape, slot.dtype) for name, slot in plan.slots.items()}
    for name in {*plan.terms, *plan.changes, *plan.quantized, *plan.packed}:
        cost[name] *= _MERGED_COST
    together: dict[str, list[str]] = {}
    for name in cost:  # the parts of what is read whole are one rank's
        together.setdefault(plan.fused.get(name, name), []).append(name)
    total = {group: sum(cost[name] for name in names) for group, names in together.items()}
    shares: list[list[str]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for group in sorted(total, key=lambda group: -total[group]):
        rank = load.index(min(load))
        shares[rank] += together[group]
        load[rank] += total[group]
    place = {name: (entry.shard, entry.offset) for name, entry in plan.tensors.items()}
    return [sorted(share, key=place.__getitem__) for share in shares]
