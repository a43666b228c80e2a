"""Factors of fused experts out of PEFT adapters, in either form that ``carrier`` describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.checkpoint.adapters.carrier import (
    APART,
    DOWN,
    GATED,
    INNER,
    MIXTRAL,
    PLAIN,
    SINGLE_EXPERT,
    STACKED,
    Names,
    is_experts,
    model_path,
)
from oneshot.checkpoint.adapters.experts import PROJECTIONS
from oneshot.checkpoint.adapters.scaling import rank_of, scalings
from oneshot.checkpoint.adapters.update import Factors, Update, transposed
from oneshot.errors import UserError


@dataclass(frozen=True)
class Uncarried:
    """An adapter's factors by matrix, those of experts as an update names them.

    Attributes:
        stored: without the scaling
        scaling: of each
        form: of the experts' factors in the file; "" where there are none
        names: of single experts there
        ranks: module of experts, as the file names it -> rank of an expert in it
        swapped: see ``oneshot.checkpoint.adapters.carrier.swapped_in``; none where the file does not tell, and
            ``stored`` is as if not
    """

    stored: Update
    scaling: dict[str, float]
    form: str
    names: Names
    ranks: dict[str, int]
    swapped: bool | None = False


def parameter_of(module: str, parameters: list[str], sizes: Mapping[str, tuple[int, int]]) -> str | None:
    """Return which parameter the factors of a module are of; none where they are of the layer itself.

    Args:
        module: as the file names it, "...experts" or "...experts.base_layer"
        parameters: those that the config names (``target_parameters``), whole names or ends of them; names of what the
            model lacks, too, which PEFT passes over
        sizes: module -> out and in of its factors, of all that the file has
    """
    path = module.removesuffix(INNER)
    if not is_experts(path):
        return None
    held = [
        name
        for name in (f"{path}.{projection}" for projection in PROJECTIONS)
        if any(name == given or name.endswith(f".{given}") for given in parameters)
    ]
    inner, outer, gated, up = sizes.get(path + INNER), sizes.get(path), f"{path}.{GATED}", f"{path}.up_proj"
    if gated in held and up in held:  # a model has one of them: the gated one puts out twice what down takes in
        apart = inner is not None and outer is not None and 2 * outer[1] != inner[0] and 2 * outer[0] != inner[1]
        held.remove(gated if apart else up)
    return next(iter(held if module != path else reversed(held)), None)


def is_by_weight(module: str, config: dict[str, Any]) -> bool:
    """Return whether an adapter's config names a module by its weight, as it does routers (``target_parameters``)."""
    given = [str(name) for name in config.get("target_parameters") or []]
    return any(f".{module}.weight".endswith(f".{name}") for name in given)


def uncarried(pairs: Update, config: dict[str, Any], path: Path, swapped: bool | None = None) -> Uncarried:
    """Return what an adapter's file holds, matrix by matrix.

    Args:
        pairs: module as the file names it -> its factors, which fit each other
        path: of the config, for messages
        swapped: see ``oneshot.checkpoint.adapters.carrier.swapped_in``; none: as the factors' shapes tell

    Raises:
        UserError: factors of experts do not fit the config, or each other
    """
    parameters = [str(name) for name in config.get("target_parameters") or []]
    single = {module: match for module in pairs if (match := SINGLE_EXPERT.fullmatch(module))}
    sizes = {module: (factors.b.shape[0], factors.a.shape[1]) for module, factors in pairs.items()}
    together = {
        module: found
        for module in pairs
        if module not in single and (found := parameter_of(module, parameters, sizes)) is not None
    }
    if single and together:
        raise UserError(f"{path.parent} holds factors of experts together and one by one: save the adapter again.")
    stored = {
        model_path(module): factors
        for module, factors in pairs.items()
        if module not in single and module not in together
    }
    called = {module: f"{module}.weight" if is_by_weight(module, config) else module for module in stored}
    known = scalings(config, {called[module]: factors.rank for module, factors in stored.items()}, path)
    scaling = {module: known[name] for module, name in called.items() if name in known}
    if together:
        ranks = {module: rank_of(config, parameter, path) for module, parameter in together.items()}
        swapped = _is_swapped(together, sizes) if swapped is None else swapped
        scaling |= _of_experts(stored, pairs, together, ranks, config, path, swapped=bool(swapped))
        return Uncarried(stored, scaling, STACKED, PLAIN, ranks, swapped)
    ranks = {module: pairs[module].rank for module in single}
    names = PLAIN
    if single:
        if any(found[3] in MIXTRAL.every for found in single.values()):
            ends = MIXTRAL.ends if any(MIXTRAL.ends[1] in module for module in single) else PLAIN.ends
            names = Names(*MIXTRAL.every, ends)
        scaling |= _of_singles(stored, pairs, single, names, config, path)
    return Uncarried(stored, scaling, APART if single else "", names, ranks)


def _of_experts(
    stored: Update, pairs: Update, together: Mapping[str, str], ranks: dict[str, int], config: dict[str, Any],
    path: Path, *, swapped: bool,
) -> dict[str, float]:  # fmt: skip
    """Add the factors of each expert to ``stored``; their scaling."""
    found = scalings(config, {together[module]: rank for module, rank in ranks.items()}, path)
    scaling = {}
    for module, parameter in together.items():
        factors, rank = pairs[module], ranks[module]
        count = factors.rank // rank
        if count * rank != factors.rank:
            raise UserError(
                f"{path} gives the experts of {parameter} rank {rank}, but the adapter holds {factors.rank} rows of "
                "them, which is no multiple: restore both files from their source."
            )
        a = factors.a.reshape(count, rank, -1)
        b = factors.b.reshape(len(factors.b), rank, count)
        experts, _, projection = parameter.rpartition(".")
        for index in range(count):
            name = f"{experts}.{index}.{projection}"
            one = Factors(b[:, :, index].contiguous(), a[index])
            stored[name] = transposed(one) if swapped else one
            scaling[name] = found[parameter]
    return scaling


def _is_swapped(together: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> bool | None:
    """Whether A is over out and B over in: what gate and up put out is then what is twice as wide as down's input.

    None where there are no factors of both in any layer, which alone tell.

    Args:
        together: module as the file names it -> its parameter
        sizes: module -> rows of B and columns of A
    """
    by_parameter = {parameter: sizes[module] for module, parameter in together.items()}
    for parameter, gated in by_parameter.items():
        path, _, projection = parameter.rpartition(".")
        down = by_parameter.get(f"{path}.{DOWN}")
        if projection == GATED and down is not None:
            return gated[1] == 2 * down[0]  # of others down puts out as much as the gate takes in
    return None


def _of_singles(
    stored: Update, pairs: Update, single: Mapping[str, re.Match[str]], names: Names, config: dict[str, Any],
    path: Path,
) -> dict[str, float]:  # fmt: skip
    """Add the factors of each expert to ``stored``, gate and up as one matrix, as PEFT fuses them; their scaling."""
    by_expert: dict[tuple[str, str], dict[str, Factors]] = {}
    for module, found in single.items():
        by_expert.setdefault((model_path(found[1]), found[2]), {})[found[3]] = pairs[module]
    ranks: dict[str, int] = {}
    parameters: dict[str, str] = {}
    for (experts, index), held in by_expert.items():
        gate, up, down = (held.get(name) for name in names.every)
        both = {GATED: _fused(gate, up, path)} if gate is not None else {"up_proj": up}
        for projection, factors in {**both, DOWN: down}.items():
            if factors is None:
                continue
            name, parameter = f"{experts}.{index}.{projection}", f"{experts}.{projection}"
            stored[name], parameters[name] = factors, parameter
            ranks[parameter] = gate.rank + up.rank if projection == GATED and gate and up else factors.rank
    alpha = config.get("lora_alpha")
    if isinstance(alpha, (int, float)):  # so does PEFT, as the rank of what it fuses is twice that of each
        patterns = {**(config.get("alpha_pattern") or {}), rf".*\.{GATED}": 2 * alpha}
        config = {**config, "alpha_pattern": patterns}
    found_scaling = scalings(config, ranks, path)
    return {name: found_scaling[parameter] for name, parameter in parameters.items()}


def _fused(gate: Factors, up: Factors | None, path: Path) -> Factors:
    """The factors of gate and up as one matrix: gate's rows, then up's."""
    import torch

    if up is None:
        return Factors(torch.cat([gate.b, torch.zeros_like(gate.b)]), gate.a)
    if gate.b.shape[0] != up.b.shape[0] or gate.a.shape[1] != up.a.shape[1]:
        raise UserError(f"{path.parent} holds factors of an expert's gate and up that do not fit: save it again.")
    if gate.a.shape == up.a.shape and torch.equal(gate.a, up.a):
        return Factors(torch.cat([gate.b, up.b]), gate.a)
    return Factors(torch.block_diag(gate.b, up.b), torch.cat([gate.a, up.a]))
