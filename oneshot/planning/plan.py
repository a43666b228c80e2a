"""A plan as one value: from settings to every way to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oneshot.planning.model import PlannedModel, compared_bytes, read_model
from oneshot.planning.rows import Row, own_rows, rows
from oneshot.planning.shapes import PATCHED, stored_bytes
from oneshot.settings import Settings


@dataclass(frozen=True)
class Plan:
    """What runs of a model take.

    Attributes:
        model: its name and shape
        gpus: GPUs over all machines
        rank, rank_experts: of a repair's patch
        rows: every method, precision and sharding of the stage that is planned
        own: those rows that the settings ask for; all where they name neither a method nor a precision
    """

    model: PlannedModel
    gpus: int
    rank: int
    rank_experts: int
    rows: tuple[Row, ...]
    own: tuple[Row, ...]

    @property
    def reach(self) -> dict[str, float]:
        """What of the parameters a patch reaches (linear layers, experts) and does not: shares, by kind."""
        shape, every = self.model.shape, self.model.shape.parameters
        linears = shape.of(*PATCHED)
        experts = shape.reached - linears
        kinds = {
            "linear layers": linears, "experts": experts, "experts out of reach": shape.of("fused") - experts,
            "embeddings": shape.of("embedding", "head"), "vision and other towers": shape.of("tower"),
            "norms, routers and others": shape.of("other"),
        }  # fmt: skip
        return {kind: count / every for kind, count in kinds.items() if count}

    @property
    def patch_bytes(self) -> dict[str, int]:
        """Bytes of a repair's patch, as it is written in 16 bits: factors of linear layers, and of fused experts."""
        shape = self.model.shape
        layers = 2 * shape.low_rank(self.rank)
        return {"linear layers": layers, "experts": 2 * shape.written(self.rank, self.rank_experts) - layers}

    @property
    def compared(self) -> int:
        """Bytes that are read for the fine-tune's own update: what a patch reaches, in both checkpoints."""
        return compared_bytes(self.model)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoint, in the form that its config.json names."""
        return stored_bytes(self.model.shape, self.model.stored_as)

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
    ranks = settings.repair.rank, settings.repair.rank_experts
    return Plan(model, settings.plan.gpus, *ranks, tuple(found), tuple(own_rows(settings, model, found)))


def as_json(plan: Plan) -> dict[str, Any]:
    """Return everything as plain values; bytes and seconds."""
    shape = plan.model.shape
    return {
        "model": plan.model.name,
        "parameters": shape.parameters,
        "linear_parameters": shape.of(*PATCHED),
        "expert_parameters": shape.of("expert", "fused"),
        "expert_matrices": sum(many for many, _, _ in shape.experts),
        "reach": plan.reach,
        "compared_bytes": plan.compared,
        "patch_bytes": plan.patch_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "stored_as": plan.model.stored_as or "bf16",
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
