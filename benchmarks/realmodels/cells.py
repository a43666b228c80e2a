"""One cell: one repair of one attacked model, measured once; all finished ones are in one JSON file without texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduce.cells import MODEL_CODE

from realmodels.alone import alone
from realmodels.attacks import ATTACKS, scored_with

SCHEMA = 1
ALIGNED, FINETUNED = "aligned", "none"  # methods that are none: the model before the attack, and after it
DEFAULT = "auto"
OURS = (DEFAULT, "lowrank", "project", "lora", "sft")
SEVERAL = "sft, 4 examples"
PUBLISHED = ("undo", "resta", "safe_lora", "saliency", "safemerge", "llm_va", "sldr", "sldr routed")
AT_TASK = ", matched"  # ends the name of a method whose strength keeps the task as well as the default repair does
BASELINES = tuple(name + end for name in PUBLISHED for end in ("", AT_TASK))
METHODS = (ALIGNED, FINETUNED, *OURS, SEVERAL, *BASELINES)
# what becomes of a model afterwards: fine-tuned again, on harmless or on obedient answers; asked or kept otherwise
AGAIN = {"benign": "benign", "harmful": "obedient"}  # by name the attack
STEPS = (10, 30, 100)
SAMPLED, INT8, NF4, BF16 = "temperature 0.7", "8 bits", "4 bits", "bf16"
AFTER = (*(f"{kind}, {steps} steps" for kind in AGAIN for steps in STEPS), SAMPLED, INT8, NF4, BF16)

# what decides a score, and what else decides a repair: files and folders of the repository
SCORE_CODE = (
    *MODEL_CODE, "oneshot/measure", "benchmarks/realmodels/attacks.py", "benchmarks/realmodels/wording.py",
    "benchmarks/realmodels/words", "benchmarks/realmodels/prompts.py", "benchmarks/realmodels/scoring.py",
    "benchmarks/realmodels/models.py", "benchmarks/realmodels/subject.py",
)  # fmt: skip
DURABLE_CODE = (*SCORE_CODE, "benchmarks/realmodels/durable.py")
REPAIR_CODE = (
    *SCORE_CODE, "oneshot/patch", "oneshot/settings", "oneshot/assets", "oneshot/checkpoint/adapters/update.py",
    "oneshot/repair.py", "benchmarks/realmodels/methods.py", "benchmarks/realmodels/held.py",
    "benchmarks/realmodels/durable.py",
)  # fmt: skip
BASELINE_CODE = (
    *SCORE_CODE, "oneshot/assets", "benchmarks/baselines", "benchmarks/realmodels/methods.py",
    "benchmarks/realmodels/held.py", "benchmarks/realmodels/given.py", "benchmarks/realmodels/others.py",
    "benchmarks/realmodels/steering.py", "benchmarks/realmodels/matching.py",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        model: of ``models.MODELS``, or a folder's name
        attack: of ``ATTACKS``
        training: of ``attacks.TRAININGS``
        seed: of data and training
        method: of ``METHODS``
        prompts: of each public set
        after: of ``AFTER``, what was done to the model before it was asked; empty: nothing
    """

    model: str
    attack: str
    training: str
    seed: int
    method: str
    prompts: int = 150
    after: str = ""

    @property
    def attacked(self) -> tuple[str, str, str, int]:
        """Which attacked model it is of."""
        return self.model, self.attack, self.training, self.seed

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """What the cells of one attacked model have in common that are compared with each other."""
        return *self.attacked, self.prompts

    @property
    def aligned(self) -> Cell:
        """Return the cell of the aligned model that this one is compared with: one for all that ask it alike."""
        asked = self.attack if scored_with(self.attack) else ATTACKS[0]
        return Cell(self.model, asked, "full", 0, ALIGNED, self.prompts, self.after)

    @property
    def needs(self) -> list[Cell]:
        """Return the cells that are measured before this one: what it is compared with, what its strength follows."""
        return [self.aligned, *([self.but(DEFAULT)] if self.method.endswith(AT_TASK) else [])]

    def but(self, method: str) -> Cell:
        """Return the cell of the same attacked model with another method."""
        return Cell(self.model, self.attack, self.training, self.seed, method, self.prompts)


def code_of(cell: Cell) -> tuple[str, ...]:
    """Return the code that decides a cell: a change of the repair leaves what was not repaired as it was."""
    if cell.method in (ALIGNED, FINETUNED):
        return DURABLE_CODE if cell.after else SCORE_CODE
    return BASELINE_CODE if cell.method in BASELINES else REPAIR_CODE


def section_a(model: str, seed: int, prompts: int) -> list[Cell]:
    """The main attack, full-weight and LoRA, with every method."""
    return _cells(model, ATTACKS[:1], seed, METHODS, prompts)


def section_b(model: str, seed: int, prompts: int) -> list[Cell]:
    """Every attack with the default repair."""
    return _cells(model, ATTACKS, seed, (ALIGNED, FINETUNED, DEFAULT), prompts)


def section_c(model: str, seed: int, prompts: int) -> list[Cell]:
    """Every attack with the paper's recipe."""
    return _cells(model, ATTACKS, seed, (ALIGNED, FINETUNED, "sft"), prompts)


def section_d(model: str, seed: int, prompts: int) -> list[Cell]:
    """What becomes of the aligned model and of the default repair after the main attack, all weights, one seed."""
    repaired = Cell(model, ATTACKS[0], "full", seed, DEFAULT, prompts)
    pairs = [(cell.aligned, cell) for cell in (dataclasses.replace(repaired, after=after) for after in AFTER)]
    return [repaired.aligned, repaired, *(cell for pair in pairs for cell in pair)]


def _cells(model: str, attacks: Iterable[str], seed: int, methods: Iterable[str], prompts: int) -> list[Cell]:
    found = [
        Cell(model, attack, training, seed, method, prompts)
        for attack in attacks
        for training in ("full", "lora")
        for method in methods
    ]
    return list(dict.fromkeys(cell.aligned if cell.method == ALIGNED else cell for cell in found))


SECTIONS = {"a": section_a, "b": section_b, "c": section_c, "d": section_d}


@dataclass(frozen=True)
class Finished:
    """A finished cell: what it said, and the digest of the code that it was measured with."""

    cell: Cell
    code: str
    result: Mapping[str, Any]


class Store:
    """The file of finished cells. Several processes may write into it, each a cell at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Cell, Finished]:
        """Return what is there; nothing where there is no file.

        Raises:
            ValueError: it is no file of cells of this schema
        """
        if not self.path.exists():
            return {}
        found = json.loads(self.path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"{self.path} holds no cells of schema {SCHEMA}.")
        rows = [Finished(Cell(**row["cell"]), row["code"], row["result"]) for row in found["cells"]]
        return {row.cell: row for row in rows}

    def put(self, finished: Finished) -> None:
        """Add a cell, in place of an older one of the same name; a kill leaves the file as it was or as it is to be."""
        from oneshot.report.runfolder import write_whole

        with alone(self.path):
            rows = {**self.read(), finished.cell: finished}
            write_whole(self.path, as_json(rows.values()))


def as_json(rows: Iterable[Finished]) -> str:
    """Return the file's text: a line a cell, in order, so that two versions can be compared."""
    ordered = sorted(
        rows, key=lambda row: (*row.cell.group[:4], _place(row.cell.method), row.cell.prompts, row.cell.after)
    )
    lines = [json.dumps({"cell": asdict(r.cell), "code": r.code, "result": dict(r.result)}) for r in ordered]
    return f'{{"schema": {SCHEMA}, "cells": [\n' + ",\n".join(lines) + "\n]}\n"


def _place(method: str) -> int:
    """A method's place in the tables; one that is no longer measured comes last."""
    return METHODS.index(method) if method in METHODS else len(METHODS)


def missing(
    wanted: Sequence[Cell], found: Mapping[Cell, Finished], codes: Mapping[Cell, str], *, any_code: bool
) -> list[Cell]:
    """Return the wanted cells that are not there, each once; one measured with other code is not, unless any will do.

    Args:
        codes: the present code's digest of each
    """
    have = {cell for cell, row in found.items() if any_code or row.code == codes.get(cell)}
    return [cell for cell in dict.fromkeys(wanted) if cell not in have]
