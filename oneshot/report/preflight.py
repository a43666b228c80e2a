"""The preflight as people see it: a table in the log, and the culprit's name where something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oneshot.checkpoint.reads.rates import look_at_storage
from oneshot.distributed.preflight import machines, preflight, refuse
from oneshot.distributed.runtime import Runtime

if TYPE_CHECKING:
    from rich.console import Console


def look_around(
    runtime: Runtime,
    when: Literal["auto", "always", "never"],
    folder: Path,
    needed: int,
    checkpoint: Path,
    console: Console | None,
) -> None:
    """Look at machines, folder, network and storage before the model is read, and show what was seen. Collective.

    Args:
        when: auto looks where there are several machines
        folder: of the run
        needed: bytes that the run will write there
        checkpoint: that will be read

    Raises:
        UserError: on every rank alike, naming the culprit
    """
    if when == "never" or (when == "auto" and machines(runtime) == 1):
        return
    checks = preflight(runtime, folder, needed)
    if not checks[-1].culprit:
        checks.append(look_at_storage(runtime, checkpoint))
    if console:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table("preflight", "seen", "", box=SIMPLE_HEAD)
        for check in checks:
            table.add_row(check.name, check.found, "WRONG" if check.culprit else "ok")
        console.print(table)
    refuse(checks)
