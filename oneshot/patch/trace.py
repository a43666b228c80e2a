"""The trace of a repair: one record per epoch, told to whoever listens as it happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from oneshot.distributed.watchdog import alive
from oneshot.training.loop import Diverged


class Tracer:
    """Collects the records of a repair and refuses losses that are no numbers.

    Args:
        listen: called with each record as it comes
    """

    def __init__(self, listen: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._listen = listen

    def add(self, **record: Any) -> None:
        alive()
        self.records.append(record)
        if self._listen:
            self._listen(record)

    def tell(self, listen: Callable[[dict[str, Any]], None] | None) -> None:
        """Tell a listener all records so far, and those to come."""
        self._listen = listen
        if listen:
            for record in self.records:
                listen(record)

    def check(self, epoch: int, loss: Any) -> None:
        """Raise Diverged if the loss is NaN or infinite."""
        if not math.isfinite(float(loss)):
            raise Diverged(
                f"The loss became {float(loss)} in epoch {epoch} of the repair: it stopped before that step; lower "
                "repair.learning_rate, or check the model for non-finite weights."
            )
