"""``oneshot verify DIR`` and ``oneshot inspect DIR``: is a checkpoint whole, and which rank would own what of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "checkpoint, adapter or training state (state/step-N)"


class NotWhole(UserError):
    """A folder that is so broken that there is no table of it."""

    code = EXIT_FAILED


def verify(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot verify``: a table, exit code 0 if all is well and 1 if not."""
    from oneshot.commandline import run_command

    run_command(argv, "oneshot verify", _verify)


def inspect(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot inspect``: tensors, dtypes, sizes, shards, and what each of N ranks would own."""
    from oneshot.commandline import run_command

    run_command(argv, "oneshot inspect", _inspect)


def _verify(argv: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from oneshot.checkpoint.disk.files import MARKER, is_degraded
    from oneshot.checkpoint.writing.verify import check_shards

    folder = _folder(_parser("oneshot verify", "Check every byte of a folder.").parse_args(argv))
    try:
        shards = check_shards(folder)
    except UserError as error:
        raise NotWhole(str(error)) from error
    table = Table("shard", "tensors", "bytes", "dtypes", "problems", box=SIMPLE_HEAD)
    for shard in shards:
        found = "\n".join(shard.problems) or "none"
        table.add_row(shard.name, f"{shard.tensors:,}", f"{shard.bytes:,}", ", ".join(sorted(shard.dtypes)), found)
    _console().print(table)
    if is_degraded(folder):
        _console().print(f"Marked as safety-degraded: {MARKER} says why.", highlight=False)
    if any(shard.problems for shard in shards):
        sys.exit(EXIT_FAILED)
    _console().print(f"Whole: {folder}", highlight=False, markup=False)


def _inspect(argv: list[str]) -> None:
    parser = _parser("oneshot inspect", "List a folder's tensors and their owners.")
    parser.add_argument("--ranks", metavar="N", type=int, default=1, help="world size of a ZeRO-3 run (1)")
    parser.add_argument("--match", metavar="TEXT", default="", help="list only tensors whose name contains this")
    options = parser.parse_args(argv)
    if options.ranks < 1:
        raise UserError(f"--ranks is {options.ranks}: give 1 or more.")
    _list(_folder(options), options.ranks, options.match)


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    from oneshot.commandline import CommandParser

    made = CommandParser(prog, description)
    made.add_argument("folder", metavar="DIR", type=Path, help=FOLDER)
    return made


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give that of a {FOLDER}.")
    return folder


def _list(folder: Path, ranks: int, match: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from oneshot.checkpoint.disk.files import is_degraded
    from oneshot.checkpoint.layout import ITEM_SIZES, owners, rank_bytes, tensor_bytes
    from oneshot.checkpoint.writing.verify import tensors_of

    tensors = tensors_of(folder)
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
    from oneshot.report.progress import wide_enough
    from oneshot.shown import open_console

    return wide_enough(open_console(), 240)
