"""Factors of fused experts as PEFT adapters hold them: of all experts together (3-D), or of each by itself (2-D).

Together, a parameter (experts, out, in) has the factors A (experts * r, in) and B (out, r * experts), B's expert index
the fastest, as PEFT's ``target_parameters`` have them: "experts.base_layer" is the first parameter, "experts" the
second. By itself, each expert has names of its own ("experts.3.gate_proj"), gate and up apart; PEFT fuses them as it
loads them, in some architectures. Which form a server takes, its class of the model says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from oneshot.checkpoint.adapters.experts import PROJECTIONS, computes_all_at_once, expert_matrices, fused_experts
from oneshot.checkpoint.adapters.update import Factors, Update

STACKED, APART = "3d", "2d"
INNER = ".base_layer"  # PEFT wraps a module once per parameter: the first one's factors are the inner wrapper's
GATED, DOWN = "gate_up_proj", "down_proj"
_EXPERT = re.compile(rf"(.*\bexperts)\.(\d+)\.({'|'.join(PROJECTIONS)})")
SINGLE_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
# models whose class in vLLM 0.32 has is_3d_moe_weight: it takes no names of single experts
_SERVED_STACKED = re.compile(r"gpt_oss|qwen3_5_moe.*|qwen3_vl_moe.*|qwen3_omni_moe.*|interns1_pro.*")
Shapes = dict[str, dict[str, tuple[int, int, int]]]  # experts module -> projection -> (experts, out, in)


@dataclass(frozen=True)
class Names:
    """What the tensors of a single expert are called.

    Attributes:
        gate, up, down: its matrices
        ends: the end of the module's name in the model, and in the file
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    ends: tuple[str, str] = ("", "")

    @property
    def every(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


PLAIN = Names()
MIXTRAL = Names("w1", "w3", "w2", ("mlp.experts", "block_sparse_moe.experts"))
_ROUTER_ENDS = ("mlp.gate", "block_sparse_moe.gate")


@dataclass(frozen=True)
class Carried:
    """An update under the names of an adapter's file.

    Attributes:
        update: module as the file names it -> factors; of linear layers, under their own names, too
        form: of the experts' factors ("3d" or "2d"); "" where there are none
        ranks: projection -> rank, of the experts
        modules: what PEFT's ``target_modules`` name of them
        parameters: what ``target_parameters`` name of them
        experts: those of ``update`` that are theirs
    """

    update: Update
    form: str = ""
    ranks: dict[str, int] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    experts: frozenset[str] = frozenset()

    @property
    def linears(self) -> Update:
        """The part that is no expert's."""
        return {name: factors for name, factors in self.update.items() if name not in self.experts}


def expert_of(name: str) -> tuple[str, int, str] | None:
    """Return experts module, expert and projection of a matrix's name in an update; none of any other name."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def is_experts(name: str) -> bool:
    """Return whether a module, as an adapter's file names it, is one or all of fused experts."""
    return SINGLE_EXPERT.fullmatch(name) is not None or re.search(r"\bexperts(\.base_layer)?$", name) is not None


def shapes_of(model: Any) -> Shapes:
    """Return the sizes of a model's fused experts."""
    found: Shapes = {}
    for matrix in expert_matrices(model).values():
        size = (matrix.index + 1, matrix.out_features, matrix.in_features)
        found.setdefault(matrix.path, {})[matrix.projection] = size  # the last expert's stays
    return found


def swapped_in(model: Any) -> bool:
    """Return whether PEFT takes (experts, in, out) for (experts, out, in), as of Llama-4: its A is then B of ours."""
    return any(computes_all_at_once(module) for module in fused_experts(model).values())


def served_form(model_type: str) -> str:
    """Return the form that a model's class in vLLM takes; where that is single names, PEFT need not."""
    return STACKED if _SERVED_STACKED.fullmatch(model_type) else APART


def written_form(model: Any) -> str:
    """Return the form that a patch of a model has: the served one, where PEFT takes single experts for fused ones."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if served_form(model.config.model_type) == STACKED:
        return STACKED
    config = LoraConfig(target_modules=list(names_for(model).every))
    convert_peft_config_for_transformers(config, model, None)
    return APART if GATED in (config.target_parameters or []) else STACKED


def names_for(model: Any) -> Names:
    """Return what single experts' tensors are called in the checkpoints of a model, which is how servers know them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    sources = [p for each in get_model_conversion_mapping(model) for p in getattr(each, "source_patterns", [])]
    return MIXTRAL if any(pattern.endswith("w1.weight") for pattern in sources) else PLAIN


def in_form(update: Update, model: Any, form: str = "") -> Carried:
    """Return an update as an adapter of a model holds it.

    Args:
        form: of the experts' factors; none: that which the model's class in vLLM takes
    """
    form = form or served_form(model.config.model_type)
    return carried(update, form, shapes_of(model), names_for(model), swapped=swapped_in(model))


def forms_of(update: Update, model: Any, form: str = "") -> list[Carried]:
    """Return an update in the forms that are to be tried, one after the other: as ``in_form`` does, then in 3-D."""
    first = in_form(update, model, form)
    return [first, in_form(update, model, STACKED)] if first.form == APART else [first]


def carried(
    update: Update, form: str = "", shapes: Shapes | None = None, names: Names = PLAIN,
    ranks: Mapping[str, int] | None = None, *, swapped: bool = False,
) -> Carried:  # fmt: skip
    """Return an update as an adapter holds it.

    Experts that it does not change get factors of zero: neither form can leave one out.

    Args:
        form: of the experts' factors, where there are any; none: 3-D, which PEFT takes of every architecture
        shapes: of the model's experts, others than which there are none; none: those in the update are all
        names: of single experts' tensors, in 2-D
        ranks: module as the file names it -> rank of an expert in it, where that is given; none: the least that does
        swapped: see ``swapped_in``
    """
    experts = {
        name: factors
        for name, factors in update.items()
        if (one := expert_of(name)) and (shapes is None or one[0] in shapes)
    }
    linears = {name: factors for name, factors in update.items() if name not in experts}
    if not experts:
        return Carried(linears)
    sizes = sizes_of(experts)
    if form == APART:
        sizes = shapes or sizes  # PEFT gives factors to the experts of every layer
        held, found = _apart(experts, sizes, names, ranks)
        modules = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in held))
        return Carried({**linears, **held}, APART, found, modules, (), frozenset(held))
    sizes = {path: (shapes or {}).get(path, size) for path, size in sizes.items()}
    held, found = _stacked(experts, sizes, ranks, swapped=swapped)
    parameters = tuple(f"{path}.{projection}" for path, size in sizes.items() for projection in size)
    return Carried({**linears, **held}, STACKED, found, (), parameters, frozenset(held))


def sizes_of(experts: Update) -> Shapes:
    """Return the sizes of experts' parameters as far as an update tells."""
    found: Shapes = {}
    for name, factors in experts.items():
        path, index, projection = expert_of(name) or ("", 0, "")
        known = found.setdefault(path, {}).get(projection, (0, 0, 0))
        found[path][projection] = (max(known[0], index + 1), factors.b.shape[0], factors.a.shape[1])
    every = {path: max(size[0] for size in sizes.values()) for path, sizes in found.items()}
    return {path: {p: (every[path], *sizes[p][1:]) for p in PROJECTIONS if p in sizes} for path, sizes in found.items()}


def _stacked(
    experts: Update, sizes: Shapes, given: Mapping[str, int] | None, *, swapped: bool
) -> tuple[Update, dict[str, int]]:
    """The factors of each parameter's experts together, and their rank by projection."""
    least = {name: trimmed(factors) for name, factors in experts.items()}
    ranks = {projection: 1 for size in sizes.values() for projection in size}
    for name, factors in least.items():
        projection = name.rsplit(".", 1)[-1]
        ranks[projection] = max(ranks[projection], factors.rank)
    like = next(iter(least.values())).a
    held: Update = {}
    for path, size in sizes.items():
        for place, (projection, (count, m, n)) in enumerate(size.items()):
            module = path + (INNER if place == 0 and len(size) > 1 else "")
            rank = ranks[projection] if given is None else given[module]
            a, b = like.new_zeros(count, rank, n), like.new_zeros(m, rank, count)
            for index in range(count):
                one = least.get(f"{path}.{index}.{projection}")
                if one is not None:
                    a[index, : one.rank], b[:, : one.rank, index] = one.a, one.b
            if swapped:
                a, b = b.permute(2, 1, 0), a.permute(2, 1, 0)
            held[module] = Factors(b.flatten(1), a.flatten(0, 1))
    return held, ranks


def _apart(
    experts: Update, sizes: Shapes, names: Names, given: Mapping[str, int] | None
) -> tuple[Update, dict[str, int]]:
    """The factors of each expert by itself, all of one rank where none is given, and that."""
    held: Update = {}
    like = next(iter(experts.values())).a
    for path, size in sizes.items():
        for projection, (count, m, n) in size.items():
            for index in range(count):
                found = experts.get(f"{path}.{index}.{projection}")
                factors = Factors(like.new_zeros(m, 1), like.new_zeros(1, n)) if found is None else found
                held |= dict(_single(f"{_written(path, names)}.{index}", projection, factors, names))
    rank = max(factors.rank for factors in held.values())
    wide = {name: padded(factors, rank if given is None else given[name]) for name, factors in held.items()}
    return wide, dict.fromkeys(PROJECTIONS, rank)


def singles(name: str, factors: Factors, names: Names) -> list[tuple[str, Factors]]:
    """Return the factors of an expert's matrix under the names that single experts have."""
    path, index, projection = expert_of(name) or ("", 0, "")
    return list(_single(f"{_written(path, names)}.{index}", projection, factors, names))


def _single(expert: str, projection: str, factors: Factors, names: Names) -> Iterator[tuple[str, Factors]]:
    if projection == GATED:
        half = factors.b.shape[0] // 2
        yield f"{expert}.{names.gate}", trimmed(Factors(factors.b[:half], factors.a))
        yield f"{expert}.{names.up}", trimmed(Factors(factors.b[half:], factors.a.clone()))
    else:
        yield f"{expert}.{names.down if projection == DOWN else names.up}", trimmed(factors)


def halves(name: str, factors: Factors) -> tuple[Factors, Factors] | None:
    """Return the factors of an expert's gate and of its up where they share no direction; none where they do.

    An adapter of single experts gives each its own; in it they must stay apart, or neither fits its rank any more.

    Args:
        name: of the matrix in an update
    """
    if not name.endswith(f".{GATED}") or expert_of(name) is None:
        return None
    half = factors.b.shape[0] // 2
    upper, lower = (part.ne(0).any(dim=0) for part in (factors.b[:half], factors.b[half:]))
    if not bool(upper.any()) or not bool(lower.any()) or bool((upper & lower).any()):
        return None
    gate, up = Factors(factors.b[:half], factors.a), Factors(factors.b[half:], factors.a)
    return trimmed(gate), trimmed(up)


def model_path(path: str) -> str:
    """Return the model's name of an experts module, or of a router, that a file names as Mixtral's do."""
    for model, file in (MIXTRAL.ends, _ROUTER_ENDS):
        if path.endswith(f".{file}"):
            return path.removesuffix(file) + model
    return path


def _written(path: str, names: Names) -> str:
    model, file = names.ends
    return path.removesuffix(model) + file if model and path.endswith(model) else path


def trimmed(factors: Factors) -> Factors:
    """Return the factors without the directions that are zero in one of them; one stays."""
    kept = factors.b.ne(0).any(dim=0) & factors.a.ne(0).any(dim=1)
    if bool(kept.all()):
        return factors
    if not bool(kept.any()):
        return Factors(factors.b[:, :1], factors.a[:1])
    return Factors(factors.b[:, kept], factors.a[kept])


def padded(factors: Factors, rank: int) -> Factors:
    """Return the factors with directions of zero up to ``rank``."""
    import torch

    missing = rank - factors.rank
    if not missing:
        return factors
    b, a = factors.b, factors.a
    return Factors(
        torch.cat([b, b.new_zeros(len(b), missing)], dim=1), torch.cat([a, a.new_zeros(missing, a.shape[1])])
    )
