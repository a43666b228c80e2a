"""The plan as one table, for a terminal and for a log file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from oneshot.planning.facts import GIB
from oneshot.planning.memory import is_packed
from oneshot.planning.model import SCALED
from oneshot.planning.plan import Plan
from oneshot.planning.rows import Row
from oneshot.settings import PlanSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 160
_WIDEST = 400  # columns that no row takes
_HEADS = (
    "method", "weights", "sharding", "load", "steady", "step", "save", "host", "optimizer", "state", "result",
    "minutes", "fits", "GPUs", "to change",
)  # fmt: skip
_TEXTS = ("method", "weights", "sharding", "to change")
# what is left out in ever narrower windows; what to change is said below the table then
_DISK = ("to change", "optimizer", "state", "result")
_LEFT_OUT = ((), ("to change",), _DISK, (*_DISK, "load", "save"))
_GB = 10**9


def plan_table(found: Iterable[Row], left_out: Collection[str] = ()) -> Table:
    """Return the table: memory of a GPU and of a machine in GiB, files in GB.

    Args:
        left_out: columns that there is no room for
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if left_out else (0, 1))
    for head in _HEADS:
        if head not in left_out:
            table.add_column(head, justify="left" if head in _TEXTS else "right", no_wrap=True)
    previous = ""
    said: set[tuple[str, str]] = set()
    for row in found:
        memory = row.memory
        if previous and row.method != previous:
            table.add_section()
        previous = row.method
        cells = [row.method, row.choice.held_in, row.sharding]
        cells += [gib(value) for value in (memory.load, memory.steady, memory.step, memory.save, memory.host)]
        cells += [gib(row.optimizer) if row.optimizer else "none", gb(row.state) if row.state else "none"]
        cells += [gb(row.result), minutes(row.time.total), "yes" if row.fits else "no", str(row.smallest or "-")]
        cells.append(row.advice)
        if row.impossible:
            if (row.method, row.precision) in said:
                continue
            said.add((row.method, row.precision))
            cells = [row.method, row.precision, "any", *["-"] * 9, "no", "-", row.impossible]
        table.add_row(*(cell for head, cell in zip(_HEADS, cells) if head not in left_out))
    return table


def print_plan(options: PlanSettings, plan: Plan, console: Console) -> None:
    """Print what was planned; in a log file plain text, wide enough for nothing to be cut."""
    from oneshot.shown import open_console

    if not console.is_terminal:
        console = open_console(file=console.file, width=WIDTH, force_terminal=False, color_system=None)
    model, shape = plan.model, plan.model.shape
    machines = math.ceil(options.gpus / options.gpus_per_node)
    say = [
        f"{model.name}: {shape.parameters:,} parameters, {shape.reached:,} of them in layers that a "
        f"patch may change; checkpoint {gb(plan.checkpoint_bytes)} GB.",
        f"{options.stage} on {options.gpus} x {options.gpu_memory}, {machines} machine{'s' if machines > 1 else ''} of "
        f"{options.host_memory}, {options.tokens} tokens. GiB of a GPU: load, steady, step, save; of a machine: host; "
        "of all GPUs: optimizer. GB on disk: state, result. GPUs: the fewest that fit.",
    ]
    packed = replace(plan.rows[0].choice, precision="nf4")
    kept = sum(w.numel * w.count for w in shape.weights if w.kind == "fused" and not is_packed(w, packed))
    if kept:
        say.append(f"{kept:,} parameters of fused experts stay in 16 bits where linear layers are read in 4.")
    if model.stored_as in SCALED:
        say.append(
            f"Its files are in {model.stored_as.upper()}, and are read as the numbers that they stand for; a patch of "
            "it is served as an adapter, or merged into a copy of the checkpoint in 16 bits."
        )
    if options.stage == "repair":
        say += _patch(plan)
    for line in say:
        console.print(line, highlight=False, soft_wrap=True)
    left_out: tuple[str, ...] = ()
    for left_out in _LEFT_OUT:
        table = plan_table(plan.rows, left_out)
        if console.measure(table, options=console.options.update(width=_WIDEST)).maximum <= console.width:
            break
    console.print(table)
    for line in dict.fromkeys(map(_advised, plan.rows)) if left_out else ():
        console.print(line, highlight=False, soft_wrap=True, end="\n" if line else "")
    if len(left_out) > 1:
        said = f"Left out for want of room: {', '.join(left_out[1:])}; {WIDTH} columns show all."
        console.print(said, highlight=False, soft_wrap=True)
    console.print("Estimates: see docs/plan.md for what they hold, and how far they were from measured peaks.")


def _patch(plan: Plan) -> list[str]:
    """What a patch reaches, how large it is, and what is read for it."""
    experts, sizes = sum(many for many, _, _ in plan.model.shape.experts), plan.patch_bytes
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in plan.reach.items())
    said = f"A patch in 16 bits: linear layers at rank {plan.rank} {gb(sizes['linear layers'])} GB"
    if experts:
        said += f", {experts:,} matrices of experts at rank {plan.rank_experts} {gb(sizes['experts'])} GB"
    return [
        f"{said}. It reaches linear layers{' and experts' if experts else ''}, of all parameters: {shares}.",
        f"rollback on two checkpoints reads {gb(plan.compared)} GB of them for their difference.",
    ]


def _advised(row: Row) -> str:
    """What a row's last column says, with what it is of; "" where it says nothing."""
    if row.impossible:
        return f"{row.method}, {row.precision}: {row.impossible}"
    return f"{row.method}, {row.choice.held_in}, {row.sharding}: {row.advice}" if row.advice else ""


def gib(value: int) -> str:
    """Return bytes in GiB, three digits or so."""
    return _short(value / GIB)


def gb(value: int) -> str:
    """Return bytes in GB (10^9), three digits or so."""
    return _short(value / _GB)


def minutes(seconds: float) -> str:
    """Return seconds in minutes."""
    return _short(seconds / 60)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
