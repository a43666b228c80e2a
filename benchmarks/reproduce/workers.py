"""Two processes work off what is missing: each takes a fine-tuned model and all that is to be done to it."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from reproduce import measuring, models
from reproduce.cells import Cell, all_digests, keep_digests, read_result, write_result

WORKERS = 2
# CPU seconds, as measured: for the estimate only
FINETUNE = {"smaller": 6.0, models.SHIPPED: 10.0, "larger": 25.0}
ALIGN = {"smaller": 23.0, "larger": 97.0}
SECONDS = {"auto": 3.8, "lowrank": 5.5, "project": 0.8, "sft": 0.7, "lora": 1.0}
CHOICE = {"auto": 19.0, "sft": 5.7, "project": 2.4}  # of the bilevel choice, beside the repair
SCORING = 0.4
LARGER = 2.4  # times the shipped size


def missing_cells(folder: Path, cells: Iterable[Cell], *, any_code: bool = False) -> list[Cell]:
    """Return the cells whose results are not there, each once, in order."""
    return [cell for cell in dict.fromkeys(cells) if read_result(folder, cell, any_code=any_code) is None]


def grouped(cells: Iterable[Cell]) -> dict[tuple[str, int, str], list[Cell]]:
    """Return the cells by the fine-tuned model that they share."""
    groups: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def estimate(folder: Path, cells: Iterable[Cell]) -> float:
    """Return about how many CPU seconds the cells and the models that they need will take."""
    total = 0.0
    groups = grouped(cells)
    for (attack, seed, size), group in groups.items():
        factor = LARGER if size == "larger" else 1.0
        total += 0.0 if models.finetuned_folder(folder / "models", attack, seed, size).exists() else FINETUNE[size]
        total += factor * sum(_seconds(cell) for cell in group)
    for size in {size for _, _, size in groups} - {models.SHIPPED}:
        total += 0.0 if models.aligned_folder(folder / "models", size).exists() else ALIGN[size]
    return total


def _seconds(cell: Cell) -> float:
    method = cell.method if cell.reference else "lowrank"
    choice = {"bilevel": CHOICE.get(method, 0.0), "alignment": 1.0}.get(cell.example, 0.0)
    return SECONDS.get(method, SCORING) + choice


def work_off(folder: Path, cells: list[Cell]) -> list[str]:
    """Measure the cells; return what went wrong, by cell or model, with everything else done."""
    started, failed = time.monotonic(), []
    context, digests = get_context("spawn"), all_digests()
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_start, initargs=(digests,)) as executor:
        for tasks in waves(folder, cells):
            running = [executor.submit(*task) for task in tasks]
            for number, future in enumerate(as_completed(running), 1):
                said, errors = future.result()
                failed += errors
                minutes = (time.monotonic() - started) / 60
                print(f"{minutes:5.1f} min  {number}/{len(running)}  {said}", file=sys.stderr, flush=True)
    return failed


def waves(folder: Path, cells: Iterable[Cell]) -> list[list[tuple[Any, ...]]]:
    """Return what the processes are to do, each wave when the one before is done: what several groups need is first."""
    groups = grouped(cells)
    longest = sorted(groups.items(), key=lambda item: -sum(map(_seconds, item[1])))
    sizes = sorted({size for _, _, size in groups} - {models.SHIPPED})
    wants_unaligned = any(cell.method in ("resta", "safe_lora") for group in groups.values() for cell in group)
    shipped = [(_work, folder, group, todo) for group, todo in longest if group[2] == models.SHIPPED]
    others = [(_work, folder, group, todo) for group, todo in longest if group[2] != models.SHIPPED]
    found: list[list[tuple[Any, ...]]] = [
        [(_make, folder, "")] if wants_unaligned else [],
        [(_make, folder, size) for size in sizes] + shipped,
        others,
    ]
    return [wave for wave in found if wave]


def _start(digests: dict[tuple[str, ...], str]) -> None:
    import torch

    keep_digests(digests)
    torch.set_num_threads(1)


def _make(folder: Path, size: str) -> tuple[str, list[str]]:
    """Make the aligned model of a size, or the unaligned one, which several groups need."""
    from oneshot.distributed.runtime import start

    if size:
        models.make_aligned(folder / "models", size)
    else:
        models.make_unaligned(start(), folder / "models")
    return f"aligned, {size}" if size else "unaligned", []


def _work(folder: Path, group: tuple[str, int, str], cells: list[Cell]) -> tuple[str, list[str]]:
    """Make a fine-tuned model and measure its cells; return what was done, and what went wrong."""
    from oneshot.distributed.runtime import start

    runtime, failed = start(), []
    name = f"{group[0]}, seed {group[1]}" + ("" if group[2] == models.SHIPPED else f", {group[2]}")
    try:
        models.make_finetuned(runtime, folder / "models", *group)
    except Exception:
        return name, [f"{name}: {traceback.format_exc()}"]

    def result_of(cell: Cell) -> dict[str, Any]:
        found = read_result(folder, cell)
        if found is None:
            found = measuring.measure_cell(runtime, folder / "models", cell, result_of)
            write_result(folder, cell, found)
        return found

    for cell in sorted(cells, key=lambda cell: cell.example in ("sft", "auto", "project")):  # after what they wait for
        try:
            result_of(cell)
        except Exception:  # the other cells are worth having
            failed.append(f"{cell}: {traceback.format_exc()}")
    return name, failed
