"""The merge of an adapter that is more than a low-rank update, worked out and checked before anything is written.

DoRA's rows, rows of tokens, biases and modules that were saved whole are merged tensor by tensor as plain factors are.
What PEFT alone can apply is merged by PEFT with the model in memory, and its tensors take the places of the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.carrier import expert_of
from oneshot.checkpoint.adapters.effective import Effective
from oneshot.checkpoint.adapters.experts import bare_matrices
from oneshot.checkpoint.classes import auto_class
from oneshot.checkpoint.disk.files import find_weight, list_tensors, read_tensor
from oneshot.checkpoint.layout import FLOATS
from oneshot.checkpoint.loading.architecture import Architecture, architecture_of
from oneshot.checkpoint.loading.configs import read_config
from oneshot.checkpoint.merging.merge_plan import Change, MergePlan, fitting, plan_merge
from oneshot.checkpoint.names import ADAPTER_CONFIG, CONFIG
from oneshot.checkpoint.writing.merge_experts import Term, expert_terms, experts_in
from oneshot.checkpoint.writing.write import plan_shards
from oneshot.errors import UserError, first_line
from oneshot.reading import read_object

if TYPE_CHECKING:
    import torch


def plan_effective(
    base: Path, adapter: Path, effective: Effective, *, through_nf4: bool = False, double_quant: bool = False,
    trust_remote_code: bool = False,
) -> MergePlan:  # fmt: skip
    """Work out the merge of such an adapter, alone and at weight 1, into a checkpoint.

    Args:
        adapter: its folder
        through_nf4, double_quant: as of ``plan_merge``

    Raises:
        UserError: as of ``plan_merge``; or a module that was saved has another shape, other rows than the head or the
            embedding has, or a bias that the architecture lacks
    """
    plan = plan_merge(base, [], through_nf4=through_nf4, double_quant=double_quant, trust_remote_code=trust_remote_code)
    architecture = architecture_of(base, plan.tensors, trust_remote_code=trust_remote_code)
    what, tensors = f"The adapter {adapter}", dict(plan.tensors)
    effective, config = _untied(effective, architecture, tensors, base)
    terms: dict[str, list[Term]] = {}
    changes: dict[str, Change] = {}
    shapes = {name: plan.slots[name].shape if name in plan.slots else tensors[name].shape for name in tensors}
    dtypes = {name: plan.slots[name].dtype if name in plan.slots else tensors[name].dtype for name in tensors}
    for parameter, change in _changes(effective):
        name = _stored(what, parameter, base, tensors, architecture)
        changes[name] = dataclasses.replace(changes.get(name, Change()), **change)
        if dtypes[name] not in FLOATS:
            raise UserError(f"{base} holds {name} as {dtypes[name]}, to which nothing can be added.")
        shapes[name] = _shape(
            what, name, shapes[name], changes[name], base, vocabulary=parameter in _vocabulary(architecture)
        )
    experts, bare = None, bare_matrices(architecture.model)
    for module, factors in effective.factors.items():
        term = Term(factors, effective.scaling[module])
        if expert_of(module) or module in bare:
            experts = experts or experts_in(base, architecture.model)
            for name, summand in expert_terms(what, module, term, experts):
                terms.setdefault(name, []).append(summand)
            continue
        name = _stored(what, f"{module}.weight", base, tensors, architecture)
        terms[name] = [fitting(what, module, term, name, shapes[name], base, architecture)]
    config |= _grown(what, shapes, plan, architecture, base)
    slots, headers = plan_shards(shapes, dtypes)
    placed = {name for name, change in changes.items() if change.whole is not None}
    return dataclasses.replace(
        plan, tensors=tensors, terms=terms, changes=changes, slots=slots, headers=headers,
        config=dataclasses.replace(plan.config, fields=config),
        quantized=plan.quantized - placed,
    )  # fmt: skip


def _changes(effective: Effective) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each parameter, as the model names it, what becomes of it; what is in its place comes first."""
    for name, tensor in effective.whole.items():
        yield name, {"whole": tensor}
    for module, rows in effective.tokens.items():
        yield f"{module}.weight", {"rows": rows}
    for module, norms in effective.magnitudes.items():
        yield f"{module}.weight", {"norms": norms}
    for module, added in effective.biases.items():
        yield f"{module}.bias", {"added": added * effective.scaling[module]}


def _stored(what: str, parameter: str, base: Path, tensors: dict[str, Any], architecture: Architecture) -> str:
    """The stored name of a parameter; a bias stands beside its weight."""
    module, _, kind = parameter.rpartition(".")
    weight = parameter if parameter in tensors else find_weight(tensors, module)
    name = weight if weight == parameter or weight is None else weight.removesuffix("weight") + kind
    if name not in tensors:
        why = (
            "layers of this architecture have no bias there, so no checkpoint can hold it: serve the adapter unmerged"
            if kind == "bias" and weight is not None
            else "it belongs to another architecture"
        )
        raise UserError(f"{what} changes {parameter}, for which {base} holds no tensor: {why}.")
    if name in architecture.converted:
        raise UserError(
            f"{what} changes {parameter}, but {base} stores {name} in another form than transformers computes with: "
            "merge with PEFT instead."
        )
    assert name is not None
    return name


def _shape(
    what: str, name: str, shape: tuple[int, ...], change: Change, base: Path, *, vocabulary: bool
) -> tuple[int, ...]:
    """The shape of a tensor after its change, which fits it."""
    if change.whole is not None:
        found = tuple(change.whole.shape)
        if found != shape and not (vocabulary and found[1:] == shape[1:]):
            raise UserError(
                f"{what} holds {name} of shape {list(found)}, but in {base} it is {list(shape)}: it belongs to another "
                "base model."
            )
        shape = found
    rows = max(change.rows[0]) + 1 if change.rows is not None and change.rows[0] else 0
    lengths = [len(values) for values in (change.added, change.norms) if values is not None]
    if rows > shape[0] or any(length != shape[0] for length in lengths):
        raise UserError(
            f"{what} changes {max([rows, *lengths])} rows of {name}, which in {base} has {shape[0]}: it belongs to "
            "another base model."
        )
    return shape


def _vocabulary(architecture: Architecture) -> set[str]:
    """Parameters of head and embedding, whose rows are tokens."""
    return {f"{module}.weight" for module in (architecture.head, architecture.embedding) if module}


def _untied(
    effective: Effective, architecture: Architecture, tensors: dict[str, Any], base: Path
) -> tuple[Effective, dict[str, Any]]:
    """What becomes of a head that is the embedding: PEFT changes one of them, so each becomes a tensor of its own.

    Rows of tokens PEFT changes in both, and two that were saved alike are one again. A copy of the embedding that the
    files hold as the head goes then: with its old values it would be a head of its own.

    Args:
        tensors: to which the head is added where it has to stand by itself, and of which such a copy is taken
    """
    head, embedding = architecture.head, architecture.embedding
    if not architecture.tied or head is None or embedding is None:
        return effective, {}
    stored, copied = find_weight(tensors, embedding), find_weight(tensors, head)
    assert stored is not None, "a tied embedding is stored"
    ours, theirs = (effective.whole.get(f"{module}.weight") for module in (head, embedding))
    if ours is not None and theirs is not None and ours.shape == theirs.shape and bool((ours == theirs).all()):
        whole = {name: tensor for name, tensor in effective.whole.items() if name != f"{head}.weight"}
        effective, ours = dataclasses.replace(effective, whole=whole), None
        if {head, embedding}.isdisjoint(effective.factors):
            tensors.pop(copied or "", None)
            return effective, {}
    changed = {*effective.factors, *(name.removesuffix(".weight") for name in effective.whole)}
    if {head, embedding}.isdisjoint(changed) and head not in effective.tokens:
        if embedding in effective.tokens:
            tensors.pop(copied or "", None)
        return effective, {}
    if copied is None:
        tensors[f"{head}.weight"] = tensors[stored]
    if embedding in effective.tokens and head not in effective.tokens:  # which PEFT changes in both
        tokens = {**effective.tokens, head: effective.tokens[embedding]}
        effective = dataclasses.replace(effective, tokens=tokens)
    return effective, _set(base, "tie_word_embeddings", False, everywhere=True)


def _grown(
    what: str, shapes: dict[str, tuple[int, ...]], plan: MergePlan, architecture: Architecture, base: Path
) -> dict[str, Any]:
    """The config's field of a vocabulary that is of another size than the base's, in head and embedding alike."""
    found = {}
    for module in (architecture.embedding, architecture.head):
        name = f"{module}.weight" if f"{module}.weight" in shapes else find_weight(plan.tensors, module or "")
        if name in shapes:
            found[name] = shapes[name][0]
    if len(set(found.values())) > 1:
        sizes = " and ".join(f"{name} {rows}" for name, rows in found.items())
        raise UserError(f"{what} gives {sizes} rows in {base}: save the adapter with both, head and embedding.")
    before = {plan.slots[name].shape[0] for name in found if name in plan.slots}
    rows = next(iter(found.values()), None)
    return {} if rows is None or before == {rows} else _set(base, "vocab_size", rows)


def _set(base: Path, name: str, value: Any, *, everywhere: bool = False) -> dict[str, Any]:
    """Fields of config.json with one set: where it stands, else at the top."""
    fields = read_object(base / CONFIG)
    inner = {k: {**part, name: value} for k, part in fields.items() if isinstance(part, dict) and name in part}
    return {**inner, name: value} if everywhere or name in fields or not inner else inner


def merged_by_peft(base: Path, adapter: Path, *, trust_remote_code: bool = False) -> Effective:
    """Return what PEFT makes of a checkpoint with an adapter of any kind, the whole model in memory.

    Raises:
        UserError: PEFT cannot merge it, or not all of it
    """
    import torch
    from peft import PeftModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = read_config(base, trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code)
        merged: Any = PeftModel.from_pretrained(model, str(adapter))
        loading = merged.load_adapter(str(adapter), "default")  # again: the first one does not say what it left out
        lost = sorted({*loading.unexpected_keys, *loading.missing_keys})
        state: dict[str, torch.Tensor] = merged.merge_and_unload().state_dict()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"PEFT cannot merge {adapter} into {base} ({first_line(error)}): save it as a plain LoRA (for LoRA "
            "initializations that change the base: save_pretrained with path_initial_model_for_weight_conversion)."
        ) from error
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"PEFT loads {adapter} into {base} only in part: {lost[0]}{more} has no place in the model, or is not in "
            "the file; give the base that it was trained on, or save it again."
        )
    tensors, whole = list_tensors(base), {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    alias = {f"{name}.weight" for name, module in model.named_modules() if tied and module is head}
    for name, tensor in state.items():
        stored = name if name in tensors else find_weight(tensors, name.removesuffix(".weight"))
        before = read_tensor(tensors[stored], stored) if stored in tensors and stored is not None else None
        if name in alias and name not in tensors:
            continue
        if before is None or before.shape != tensor.shape or not torch.equal(before.to(tensor.dtype), tensor):
            whole[name] = tensor
    return Effective(read_object(adapter / ADAPTER_CONFIG), {}, whole=whole)
