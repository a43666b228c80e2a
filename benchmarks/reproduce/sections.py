"""Which cells each section of the page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reproduce.cells import ATTACKS, Cell
from reproduce.measuring import DRAWS
from reproduce.models import SHIPPED, SIZES

OURS, PAPERS = "rollback (auto)", "sft"
# name on the page -> what distinguishes the cell. To save time, what sft took as its example the other methods that
# train take, too, and lowrank does not try out candidates: its bilevel choice would take as long as its repair.
METHODS: dict[str, dict[str, Any]] = {
    "no repair": {"method": "none"},
    PAPERS: {"method": "sft"},
    "sft + guard": {"method": "sft", "guard_weight": 1.0, "example": "sft"},
    "lora": {"method": "lora", "example": "sft"},
    "lowrank": {"method": "lowrank", "example": "alignment"},
    "project": {"method": "project"},
    OURS: {"method": "auto"},
    "lowrank, no reference": {"method": "auto", "reference": False, "example": "alignment"},
    "full undo": {"method": "undo"},
    "RESTA, 0.5": {"method": "resta", "alpha": 0.5},
    "RESTA, 1": {"method": "resta", "alpha": 1.0},
    "Safe LoRA": {"method": "safe_lora"},
    "saliency": {"method": "saliency", "example": "sft"},
}
# measured by `--only h` alone: the bilevel choice for lowrank would add a quarter of an hour
LONGER: dict[str, dict[str, Any]] = {"lowrank, no reference, bilevel": {"method": "auto", "reference": False}}
EVERY = METHODS | LONGER
BASELINES = ("full undo", "RESTA, 0.5", "RESTA, 1", "Safe LoRA", "saliency")
FEW = ("no repair", PAPERS, "lowrank", OURS)
STUDIED = "harmful 100"  # where one attack stands for all
RECOVERY = tuple(attack for attack in ATTACKS if attack != "harmful 300")
COUNTS = {10: "harmful 10", 100: STUDIED, 300: "harmful 300", 1000: "harmful 1000"}
EPOCHS: dict[int, dict[str, Any]] = {
    n: METHODS[PAPERS] if n == 10 else {"method": "sft", "example": "sft", "epochs": n} for n in (2, 5, 10, 20)
}
SIZE_SEEDS = 3  # of the sizes that are not shipped, to keep within the time
EXAMPLE_ATTACKS = (STUDIED, "harmful 1000", "poison")
RULES = (*(f"random {i}" for i in range(DRAWS)), "hardest", "alignment", "bilevel")
EXAMPLE_METHODS = {OURS: "auto", PAPERS: "sft"}
SEVERAL = (1, 2, 4)
# rank on the page -> of the cell; 32 is the default, 20 the paper's, and full is that of the toy's matrices, 96
RANKS: dict[str, int | None] = {"1": 1, "2": 2, "4": 4, "8": 8, "20": 20, "32": None, "full": 96}
RANKED = {OURS: "auto", "lowrank": "alignment", "project": "project"}  # method -> its example, alike at each rank


def ranked(method: str, rank: str) -> dict[str, Any]:
    """Return what distinguishes the cell of a method at a rank.

    The gradient of one example has 20 tokens here, so that project at rank 20 is its full rank.
    """
    if rank == "32":
        return METHODS[method]
    if method == "project" and rank == "full":
        rank = "20"
    return {**METHODS[method], "rank": RANKS[rank], "example": RANKED[method]}


def several(count: int) -> dict[str, Any]:
    """Return what distinguishes the cell of sft with so many random examples."""
    return {"method": "sft", "example": "random 0"} if count == 1 else {"method": "sft", "examples": count}


def cells_of(section: str, seed: int) -> list[Cell]:
    """Return a section's cells of one seed."""

    def cells(attacks: Iterable[str], kinds: Iterable[dict[str, Any]], size: str = SHIPPED) -> list[Cell]:
        return [Cell(attack, seed, size=size, **kind) for attack in attacks for kind in kinds]

    few = [METHODS[name] for name in FEW]
    if section == "a":
        return cells(RECOVERY, METHODS.values())
    if section == "b":
        return cells(COUNTS.values(), few)
    if section == "c":
        aligned = [Cell(STUDIED, 0, "aligned", size) for size in SIZES]
        sizes = [size for size in SIZES if size == SHIPPED or seed < SIZE_SEEDS]
        return aligned + [cell for size in sizes for cell in cells([STUDIED], few, size)]
    if section == "d":
        return cells([STUDIED], [*few, *EPOCHS.values()])
    if section == "e":
        rules = [{"method": m, "example": rule} for m in EXAMPLE_METHODS.values() for rule in RULES]
        return cells(EXAMPLE_ATTACKS, [METHODS["no repair"], *rules, *map(several, SEVERAL)])
    if section == "f":
        return cells([STUDIED], [METHODS["no repair"], *(ranked(m, rank) for m in RANKED for rank in RANKS)])
    if section == "g":
        return cells([STUDIED], [{"method": "spectrum"}])
    assert section == "h"
    return cells(RECOVERY, [METHODS["no repair"], *LONGER.values()])


DEFAULT = "abcdefg"
SECTIONS = DEFAULT + "h"  # which has no heading of its own: its rows stand in (a)
