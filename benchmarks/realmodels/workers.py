"""Working off what is missing, one attacked model after the other, in as many processes as are asked for."""

from __future__ import annotations

import gc
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import MODEL_CODE, digest_of, keep_digests

from realmodels.cells import (
    ALIGNED,
    BASELINE_CODE,
    BASELINES,
    DEFAULT,
    DURABLE_CODE,
    REPAIR_CODE,
    SCORE_CODE,
    Cell,
    Finished,
    Store,
    code_of,
)

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

Group = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Places:
    """Where things are: the cache of packages and models, the file of finished cells, a folder for what is removed."""

    cache: Path
    store: Path
    scratch: Path


def digests() -> dict[tuple[str, ...], str]:
    """Return every digest of code, as it is when this is first asked."""
    return {parts: digest_of(parts) for parts in (MODEL_CODE, SCORE_CODE, DURABLE_CODE, BASELINE_CODE, REPAIR_CODE)}


def code(cell: Cell) -> str:
    """Return the present code's digest of a cell, short enough to be read."""
    return digest_of(code_of(cell))[:8]


def grouped(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Return the cells by the attacked model that they share, in order."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def work_off(places: Places, cells: Iterable[Cell], workers: int) -> list[str]:
    """Measure the cells; return what went wrong, by cell, with everything else done.

    Args:
        workers: processes of one thread each; 0: this one
    """
    started, failed, groups = time.monotonic(), [], grouped(cells)
    for model in dict.fromkeys(group[0] for group in groups):  # once, before several processes would
        failed += _prepare(places, model)
    if failed:
        return failed
    known = digests()
    if not workers:
        return [said for group in groups.values() for said in work(places, group)]
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(known,)) as executor:
        running = [executor.submit(work, places, group) for group in groups.values()]
        for number, future in enumerate(as_completed(running), 1):
            failed += future.result()
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:5.1f} min  {number}/{len(running)} attacked models", file=sys.stderr, flush=True)
    return failed


def _start(known: Mapping[tuple[str, ...], str]) -> None:
    import torch

    keep_digests(dict(known))
    torch.set_num_threads(1)


def _prepare(places: Places, model: str) -> list[str]:
    """Make the aligned model; what cannot be had is said in a sentence."""
    from oneshot.distributed.runtime import start
    from realmodels.models import make_aligned
    from realmodels.packages import Unavailable

    try:
        make_aligned(start(), places.cache, model)
    except Unavailable as error:
        return [str(error)]
    return []


def work(places: Places, cells: list[Cell]) -> list[str]:
    """Measure the cells of one attacked model, each written as it is finished; return what went wrong."""
    from oneshot.distributed.runtime import start

    runtime, store, failed = start(), Store(places.store), []
    for cell in cells:
        clock = time.monotonic()
        try:
            store.put(Finished(cell, code(cell), measure(runtime, places, cell)))
            print(f"{time.monotonic() - clock:6.0f} s  {cell}", file=sys.stderr, flush=True)
        except Exception:  # the other cells are worth having
            failed.append(f"{cell}: {traceback.format_exc()}")
            print(failed[-1], file=sys.stderr, flush=True)
        gc.collect()
    return failed


def name_of(cell: Cell) -> str:
    """Return a name for files of a cell."""
    parts = (part for part in (*cell.group, cell.method, cell.after) if part != "")
    return "-".join(str(part).replace("/", "-").replace(" ", "-") for part in parts)


def kept_of(places: Places, cell: Cell) -> Path:
    """Return the file of a cell's answers."""
    return places.cache / "answers" / f"{name_of(cell)}.json"


def judge_again(places: Places) -> int:
    """Judge the answers that the cache has, with the judge of now; return how many cells' that were."""
    from realmodels.models import aligned_folder
    from realmodels.scoring import judge_again, material_for, probes_for

    store, count = Store(places.store), 0
    for cell, row in store.read().items():
        kept, folder = kept_of(places, cell), places.scratch / name_of(cell)
        if not kept.exists():
            continue
        try:
            material = material_for(places.cache, folder, cell.seed, cell.prompts)
            probes = probes_for(material, aligned_folder(places.cache, cell.model), cell.attack)
            store.put(replace(row, result={**row.result, **judge_again(material, probes, kept)}))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        count += 1
    return count


def measure(runtime: Runtime, places: Places, cell: Cell) -> dict[str, Any]:
    """Return what a cell says: the scores of its model, and facts of its repair."""
    from realmodels.durable import measure_after
    from realmodels.held import read, task_target
    from realmodels.methods import load, repaired
    from realmodels.models import digest_of_weights, make_aligned
    from realmodels.others import repaired_by_others
    from realmodels.scoring import material_for, probes_for, score
    from realmodels.subject import make_subject

    scratch = places.scratch / name_of(cell)
    kept = kept_of(places, cell)
    try:
        aligned = make_aligned(runtime, places.cache, cell.model)
        material = material_for(places.cache, scratch / "prompts", cell.seed, cell.prompts)
        probes = probes_for(material, aligned, cell.attack)
        came_from = {"checkpoint": digest_of_weights(aligned)}
        if cell.after:
            return {**measure_after(runtime, places.cache, cell, material, probes, scratch), **came_from}
        if cell.method == ALIGNED:
            model, tokenizer = load(runtime, aligned)
            return {**score(runtime, model, tokenizer, material, probes, kept), **came_from}
        subject = make_subject(runtime, places.cache, cell)
        if cell.method in BASELINES:
            found = repaired_by_others(runtime, subject, places.cache, lambda: task_target(places.store, cell))
        else:
            found = repaired(runtime, subject, places.cache, scratch / "repair")
        result = {**score(runtime, found.model, found.tokenizer, material, probes, kept), **found.facts, **came_from}
        if cell.method == DEFAULT:  # what baselines are matched with
            result["held_task"] = read(runtime, found.model, found.tokenizer, cell.seed).task
        return result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
