"""A plan as one value: from settings to every way to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oneshot.planning.model import PlannedModel, read_model
from oneshot.planning.rows import Row, own_rows, rows
from oneshot.planning.shapes import PATCHED
from oneshot.settings import Settings


@dataclass(frozen=True)
class Plan:
    """What runs of a model take.

    Attributes:
        model: its name and shape
        gpus: GPUs over all machines
        rows: every method, precision and sharding of the stage that is planned
        own: those rows that the settings ask for; all where they name neither a method nor a precision
    """

    model: PlannedModel
    gpus: int
    rows: tuple[Row, ...]
    own: tuple[Row, ...]

    @property
    def fits(self) -> bool:
        """Whether one of the rows that the settings ask for fits."""
        return any(row.fits for row in self.own)


def make_plan(settings: Settings) -> Plan:
    """Return what the settings' model takes, without loading it: a second, some more at the first sight of a config.

    Raises:
        UserError: no model named, no config.json to be had, one that transformers cannot build, or no size
    """
    model = read_model(settings)
    found = rows(settings, model)
    return Plan(model, settings.plan.gpus, tuple(found), tuple(own_rows(settings, model, found)))


def as_json(plan: Plan) -> dict[str, Any]:
    """Return everything as plain values; bytes and seconds."""
    shape = plan.model.shape
    return {
        "model": plan.model.name,
        "parameters": shape.parameters,
        "linear_parameters": shape.of(*PATCHED),
        "expert_parameters": shape.of("expert", "fused"),
        "checkpoint_bytes": 2 * shape.parameters,
        "gpus": plan.gpus,
        "rows": [
            {
                "method": row.method, "precision": row.precision, "sharding": row.sharding,
                **vars(row.memory), "seconds": vars(row.time), "fits": row.fits, "smallest_gpus": row.smallest,
                "advice": row.advice, "result_bytes": row.result, "state_bytes": row.state,
                "optimizer_bytes": row.optimizer,
            }
            for row in plan.rows
        ],
    }  # fmt: skip
