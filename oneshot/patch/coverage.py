"""What of a model, and of the fine-tune's own update, a patch can reach: shares by kind of weight.

A patch changes linear layers. Embeddings, norms and whatever else the fine-tune has changed stay as they are; where
that is most of the update, a repair cannot bring back much, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.loading.partitioned import skeleton
from oneshot.checkpoint.loading.segments import described
from oneshot.distributed.runtime import Runtime, agree, gather_objects
from oneshot.distributed.steps import each
from oneshot.patch.held import Held, counterpart, energy_left, held_tensors

if TYPE_CHECKING:
    from oneshot.patch.bench import Bench
    from oneshot.patch.linears import Layer

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
        reference: where the update is known, the checkpoint that it is the difference to; what no target's matrix
            holds is read, each tensor by one rank
        energies: squared norm of the update of each target, where it is known
        trust_remote_code: run the checkpoint's own Python code to build its config
    """
    import torch

    tensors = list_tensors(checkpoint)  # whose own class knows them, as it is before a LoRA is put on it
    plain = skeleton(checkpoint, tensors, torch.float32, "eager", trust_remote_code)
    ours = described(checkpoint, tensors, plain)
    every = held_tensors(ours, plain, targets)
    parameters = _summed((_kind(one), one.reached, one.numbers) for one in every)
    if reference is None or not energies:
        return Coverage(parameters)
    left = [one for one in every if one.left]
    with agree(runtime, f"comparing {checkpoint} with {reference}"):
        found, theirs = dict[str, float](), described(reference, list_tensors(reference), plain)
        for one in each(left[runtime.rank :: runtime.world_size], "other tensors compared", "tensors"):
            energy = energy_left(ours, one, theirs, counterpart(one, theirs))
            if energy is not None:
                found[one.name] = energy
    rest = {name: energy for part in gather_objects(runtime, found) for name, energy in part.items()}
    reached = ((_kind_of_target(name, targets[name]), energy, energy) for name, energy in energies.items())
    others = ((_kind(one), 0.0, rest[one.name]) for one in left if one.name in rest)
    return Coverage(parameters, _summed([*reached, *others]), len(left) - len(rest))


def _kind(held: Held) -> str:
    """Its kind; of what fused experts hold it is theirs, whatever its name."""
    return "experts" if held.experts else kind_of(held.name)


def _kind_of_target(name: str, layer: Layer) -> str:
    return "experts" if isinstance(layer, ExpertMatrix) else kind_of(f"{name}.weight")


def _summed(parts: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """Kind -> (reached, all) of (kind, reached, all)."""
    found = dict[str, tuple[float, float]]()
    for kind, reached, every in parts:
        before = found.get(kind, (0.0, 0.0))
        found[kind] = (before[0] + reached, before[1] + every)
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
