"""The plan as one table, for a terminal and for a log file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from oneshot.planning.facts import GIB
from oneshot.planning.plan import Plan
from oneshot.planning.rows import Row
from oneshot.planning.shapes import PATCHED
from oneshot.settings import PlanSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 160
_GB = 10**9


def plan_table(found: Iterable[Row]) -> Table:
    """Return the table: memory of a GPU and of a machine in GiB, files in GB."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "weights", "sharding"):
        table.add_column(name, no_wrap=True)
    for name in ("load", "steady", "step", "save", "host", "optimizer", "state", "result", "minutes", "fits", "GPUs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("to change", no_wrap=True)
    previous = ""
    said: set[tuple[str, str]] = set()
    for row in found:
        memory = row.memory
        if previous and row.method != previous:
            table.add_section()
        previous = row.method
        cells = [gib(value) for value in (memory.load, memory.steady, memory.step, memory.save, memory.host)]
        cells += [gib(row.optimizer) if row.optimizer else "none", gb(row.state) if row.state else "none"]
        cells += [gb(row.result), minutes(row.time.total), "yes" if row.fits else "no", str(row.smallest or "-")]
        if not row.impossible:
            table.add_row(row.method, row.choice.held_in, row.sharding, *cells, row.advice)
        elif (row.method, row.precision) not in said:
            said.add((row.method, row.precision))
            table.add_row(row.method, row.precision, "any", *["-"] * 9, "no", "-", row.impossible)
    return table


def print_plan(options: PlanSettings, plan: Plan, console: Console) -> None:
    """Print what was planned; in a log file plain text, wide enough for nothing to be cut."""
    from oneshot.shown import open_console

    if not console.is_terminal:
        console = open_console(file=console.file, width=WIDTH, force_terminal=False, color_system=None)
    model, shape = plan.model, plan.model.shape
    machines = math.ceil(options.gpus / options.gpus_per_node)
    say = [
        f"{model.name}: {shape.parameters:,} parameters, {shape.of(*PATCHED):,} of them in layers that a patch may "
        f"change; checkpoint {gb(2 * shape.parameters)} GB.",
        f"{options.stage} on {options.gpus} x {options.gpu_memory}, {machines} machine{'s' if machines > 1 else ''} of "
        f"{options.host_memory}, {options.tokens} tokens. GiB of a GPU: load, steady, step, save; of a machine: host; "
        "of all GPUs: optimizer. GB on disk: state, result. GPUs: the fewest that fit.",
    ]
    if model.fused:
        say.append(f"Its {shape.of('fused'):,} parameters of fused experts are not patched, and not read in 4 bits.")
    for line in say:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(plan_table(plan.rows))
    console.print("Estimates: see docs/plan.md for what they hold, and how far they were from measured peaks.")


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
