"""``oneshot verify DIR`` and ``oneshot inspect DIR``: is a checkpoint whole, and which rank would own what of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.errors import EXIT_FAILED, EXIT_USER, UserError

if TYPE_CHECKING:
    from rich.console import Console


def verify(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot verify``: a table, exit code 0 if all is well and 1 if not."""
    parser = argparse.ArgumentParser(prog="oneshot verify", description="Check every byte of a checkpoint folder.")
    parser.add_argument("folder", type=Path, help="checkpoint, adapter or training state (state/step-N)")
    folder = parser.parse_args(argv).folder
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from oneshot.checkpoint.verify import check_shards

    _folder(folder, "oneshot verify")
    try:
        shards = check_shards(folder)
    except UserError as error:
        print(f"oneshot verify: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    table = Table("shard", "tensors", "bytes", "dtypes", "problems", box=SIMPLE_HEAD)
    for shard in shards:
        found = "\n".join(shard.problems) or "none"
        table.add_row(shard.name, f"{shard.tensors:,}", f"{shard.bytes:,}", ", ".join(sorted(shard.dtypes)), found)
    _console().print(table)
    sys.exit(EXIT_FAILED if any(shard.problems for shard in shards) else 0)


def inspect(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot inspect``: tensors, dtypes, sizes, shards, and what each of N ranks would own."""
    parser = argparse.ArgumentParser(
        prog="oneshot inspect", description="List a checkpoint's tensors and their owners."
    )
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--ranks", type=int, default=1, help="world size of a ZeRO-3 run")
    parser.add_argument("--match", default="", help="list only tensors whose name contains this")
    arguments = parser.parse_args(argv)
    if arguments.ranks < 1:
        print("oneshot inspect: error: --ranks must be 1 or more.", file=sys.stderr)
        sys.exit(EXIT_USER)
    _folder(arguments.folder, "oneshot inspect")
    try:
        _list(arguments.folder, arguments.ranks, arguments.match)
    except UserError as error:
        print(f"oneshot inspect: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


def _list(folder: Path, ranks: int, match: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from oneshot.checkpoint.files import is_degraded, list_tensors
    from oneshot.checkpoint.layout import ITEM_SIZES, owners, rank_bytes, tensor_bytes

    tensors = list_tensors(folder)
    console = _console()
    columns = [f"rank {rank}" for rank in range(ranks)] if ranks > 1 else []
    table = Table("tensor", "dtype", "shape", "bytes", "shard", *columns, box=SIMPLE_HEAD)
    for name, entry in tensors.items():
        if match in name:
            ranges = [f"{own.start:,}-{own.stop:,}" for own in owners(entry.shape, ranks)] if ranks > 1 else []
            size = tensor_bytes(entry.shape, entry.dtype)
            table.add_row(name, entry.dtype, str(list(entry.shape)), f"{size:,}", entry.shard.name, *ranges)
    console.print(table)
    total = sum(tensor_bytes(entry.shape, entry.dtype) for entry in tensors.values())
    console.print(f"{len(tensors):,} tensors, {total:,} bytes, {len({e.shard for e in tensors.values()})} shards.")
    by_dtype: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in tensors.items():
        by_dtype.setdefault(entry.dtype, {})[name] = entry.shape
    for rank in range(len(columns)):
        own = sum(rank_bytes(shapes, ITEM_SIZES[dtype], rank, ranks) for dtype, shapes in by_dtype.items())
        console.print(f"rank {rank} of {ranks}: {own:,} bytes, padding included.")
    if is_degraded(folder):
        console.print("This checkpoint is marked as safety-degraded.")


def _console() -> Console:
    """A console wide enough for long tensor names in a log file, so that none is cut."""
    from rich.console import Console

    from oneshot.report.progress import wide_enough

    return wide_enough(Console(), 240)


def _folder(folder: Path, prog: str) -> None:
    if not folder.is_dir():
        print(f"{prog}: error: {folder} is no folder: give a checkpoint folder.", file=sys.stderr)
        sys.exit(EXIT_USER)
