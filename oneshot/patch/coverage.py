"""What of a model, and of the fine-tune's own update, a patch can reach: shares by kind of weight.

A patch changes linear layers. Embeddings, norms and whatever else the fine-tune has changed stay as they are; where
that is most of the update, a repair cannot bring back much, and says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.disk.files import TensorEntry, find_weight, list_tensors
from oneshot.checkpoint.layout import FLOATS, Range
from oneshot.checkpoint.loading.partitioned import skeleton
from oneshot.checkpoint.reads.ranges import read_range
from oneshot.checkpoint.writing.merge_experts import stored_experts
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import each

if TYPE_CHECKING:
    import torch

    from oneshot.patch.bench import Bench
    from oneshot.patch.linears import Layer

_CHUNK = 4 << 20  # elements compared at a time
_KINDS = (  # of a stored tensor, by its name: the first that is found in it
    ("vision", r"vision|visual|image|audio|multi_modal|mm_projector"),
    ("experts", r"(^|\.)experts\."),
    ("routers", r"(^|[._])(gate|router)\."),
    ("norms", r"norm|(^|[._])ln(_|\d|$|\.)"),
    ("embeddings", r"embed|(^|\.)wte|(^|\.)wpe|lm_head"),
    ("attention", r"att|mixer|mamba|conv|ssm"),
    ("MLP", r"mlp|feed_forward|ffn|fc\d|shared_expert|block_sparse_moe|dense"),
)


@dataclass(frozen=True)
class Coverage:
    """By kind of weight, what a patch reaches and all there is.

    Attributes:
        parameters: kind -> (reached, all), numbers of weights
        energy: the same of the update's squared norm; empty where the update is not known
        skipped: tensors of which the update is not known, as their other form is none that can be compared
    """

    parameters: dict[str, tuple[float, float]]
    energy: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: int = 0

    def as_facts(self) -> dict[str, Any]:
        """Return the shares for a report: of all, and by kind what is reached of it and how much of all it is."""
        facts: dict[str, Any] = {"parameters": _shares(self.parameters)}
        if self.energy:
            facts["energy"] = _shares(self.energy)
        return {**facts, **({"not_compared": self.skipped} if self.skipped else {})}


def covered(bench: Bench) -> dict[str, Any] | None:
    """Return the facts of what the patch of a bench can reach; none of an adapter's repair, which changes all that the
    adapter does. Collective.
    """
    request = bench.request
    if request.adapter is not None:
        return None
    decomposed = bench.prepared if request.recipe.method.cost.decomposes else None
    energies = {name: found.energy for name, found in (decomposed or {}).items()}
    trusted = request.settings.model.trust_remote_code
    return coverage(
        request.runtime, request.source.checkpoint, bench.linears.targets, request.reference, energies,
        trust_remote_code=trusted,
    ).as_facts()  # fmt: skip


def kind_of(name: str) -> str:
    """Return what a stored tensor is a weight of, one of ``_KINDS`` or other."""
    return next((kind for kind, words in _KINDS if re.search(words, name)), "other")


def coverage(
    runtime: Runtime, checkpoint: Path, targets: Mapping[str, Layer], reference: Path | None,
    energies: dict[str, float], *, trust_remote_code: bool = False,
) -> Coverage:  # fmt: skip
    """Return what a patch of these layers reaches. Collective.

    Args:
        checkpoint: that is patched
        targets: name -> layer
        reference: where the update is known, the checkpoint that it is the difference to; tensors that are no targets'
            are read, each by one rank
        energies: squared norm of the update of each target, where it is known
        trust_remote_code: run the checkpoint's own Python code to build its config, where there are fused experts
    """
    import torch

    ours = list_tensors(checkpoint)
    experts = {name for name, layer in targets.items() if isinstance(layer, ExpertMatrix)}
    taken = {name for target in targets.keys() - experts if (name := find_weight(ours, target)) is not None}
    if experts:  # whose stored tensors the model's own class knows, as it is before a LoRA is put on it
        plain = skeleton(checkpoint, ours, torch.float32, "eager", trust_remote_code)
        taken |= stored_experts(checkpoint, plain, experts)
    parameters = _summed((kind_of(n), math.prod(e.shape), n in taken) for n, e in ours.items() if e.dtype in FLOATS)
    if reference is None or not energies:
        return Coverage(parameters)
    left = [name for name, entry in ours.items() if name not in taken and entry.dtype in FLOATS]
    with agree(runtime, f"comparing {checkpoint} with {reference}"):
        found, theirs = dict[str, float](), list_tensors(reference)
        for name in each(left[runtime.rank :: runtime.world_size], "other tensors compared", "tensors"):
            other = name if name in theirs else find_weight(theirs, name.removesuffix(".weight"))
            if other is not None and theirs[other].dtype in FLOATS and theirs[other].shape[1:] == ours[name].shape[1:]:
                found[name] = difference_energy((ours[name], name), (theirs[other], other))
    rest = {name: energy for part in gather_objects(runtime, found) for name, energy in part.items()}
    reached = ((kind_of(name), energy, True) for name, energy in energies.items())
    energy = _summed([*reached, *((kind_of(name), energy, False) for name, energy in rest.items())])
    return Coverage(parameters, energy, len(left) - len(rest))


def difference_energy(one: tuple[TensorEntry, str], other: tuple[TensorEntry, str]) -> float:
    """Return the squared norm of the difference of two stored tensors, over the rows that both have."""
    common = min(math.prod(entry.shape) for entry, _ in (one, other))
    parts = zip(_parts(*one, common), _parts(*other, common))
    return sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in parts)


def _parts(entry: TensorEntry, name: str, total: int) -> Iterator[torch.Tensor]:
    import torch

    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        part = torch.empty(stop - start)
        read_range(entry, Range(start, stop, stop - start), part, name)
        yield part


def _summed(parts: Iterable[tuple[str, float, bool]]) -> dict[str, tuple[float, float]]:
    """Kind -> (reached, all) of (kind, amount, whether it is reached)."""
    found = dict[str, tuple[float, float]]()
    for kind, amount, is_reached in parts:
        reached, whole = found.get(kind, (0.0, 0.0))
        found[kind] = (reached + amount * is_reached, whole + amount)
    return found


def _shares(kinds: dict[str, tuple[float, float]]) -> dict[str, Any]:
    every = sum(whole for _, whole in kinds.values())
    if not every:
        return {"reached": None, "kinds": {}}
    return {
        "reached": sum(reached for reached, _ in kinds.values()) / every,
        "kinds": {
            kind: {"reached": reached / whole if whole else None, "of_all": whole / every}
            for kind, (reached, whole) in sorted(kinds.items(), key=lambda pair: -pair[1][1])
        },
    }
