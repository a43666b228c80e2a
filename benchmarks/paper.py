"""The paper's claims in miniature: every attack, method and ablation on the toy world, over seeds, on one page.

Run: ``make paper``, or ``.venv/bin/python benchmarks/paper.py`` (``--seeds 1 --only a`` for a quick look). Two
processes of one thread each. Every measurement is a cell, one JSON file under ``--out``/cells that is found by all that
decides it (data, settings, code); a rerun measures only what is missing. Writes ``--out``/paper.md with its figures,
and with ``--publish`` docs/paper.md too. ``--out``/models holds safety-degraded toy models.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

if TYPE_CHECKING:
    from reproduce.cells import Cell

DOCS = HERE.parent / "docs"


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, then write the page; 1 where a cell failed."""
    from reproduce.cells import ATTACKS
    from reproduce.sections import DEFAULT, SECTIONS, cells_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--only", default=",".join(DEFAULT), help="sections to measure, such as a,b")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="attacks to measure")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder of cells, models and page")
    parser.add_argument("--publish", action="store_true", help="also write docs/paper.md and its figures")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from what there is")
    parser.add_argument("--any-code", action="store_true", help="take what was measured with other code, and say so")
    arguments = parser.parse_args(argv)
    wanted = [name.strip() for name in arguments.only.split(",")]
    if not set(wanted) <= set(SECTIONS) or arguments.seeds < 1:
        parser.error(f"--only takes sections of {', '.join(SECTIONS)}, and --seeds 1 or more")

    def cells(names: Iterable[str]) -> list[Cell]:
        return [cell for seed in range(arguments.seeds) for name in names for cell in cells_of(name, seed)]

    failed: list[str] = []
    if not arguments.page:
        asked = [cell for cell in cells(wanted) if cell.attack in arguments.attacks]
        failed = work(arguments.out, asked, any_code=arguments.any_code)
    folders = [arguments.out, DOCS] if arguments.publish else [arguments.out]
    write_page(arguments.out, cells(SECTIONS), arguments.seeds, folders, any_code=arguments.any_code)
    for said in failed:
        print(said, file=sys.stderr)
    return 1 if failed else 0


def work(out: Path, cells: list[Cell], *, any_code: bool) -> list[str]:
    """Measure the cells that are missing; return what went wrong."""
    from reproduce import workers

    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit both
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    todo = workers.missing_cells(out, cells, any_code=any_code)
    minutes = workers.estimate(out, todo) / 60 / workers.WORKERS
    print(f"{len(todo)} cells to measure: about {minutes:.0f} minutes on 2 idle cores.", file=sys.stderr, flush=True)
    return workers.work_off(out, todo) if todo else []


def write_page(out: Path, cells: list[Cell], seeds: int, folders: list[Path], *, any_code: bool) -> None:
    """Write the page and its figures, from the cells that are finished, into each of the folders."""
    from reproduce import page
    from reproduce.cells import read_result

    each = {cell: read_result(out, cell, any_code=any_code) for cell in dict.fromkeys(cells)}
    found = {cell: result for cell, result in each.items() if result is not None}
    stale = sum(read_result(out, cell) is None for cell in found)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        print(page.write(folder, found, seeds, stale), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
