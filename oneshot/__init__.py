"""Repair the safety of a fine-tuned language model with one example, at any size (arXiv 2601.01887).

``oneshot.repair(...)``, ``finetune``, ``score``, ``plan`` and ``export`` do what the commands of these names do, and
return values; see docs/python.md. Nothing heavy is imported before one of them is asked for.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oneshot.api import export, finetune, plan, repair, score, settings_for
    from oneshot.errors import UserError
    from oneshot.planning.plan import Plan
    from oneshot.report.exports import Exported
    from oneshot.results import Finetuned, Repair, Scores, Watched
    from oneshot.settings import (
        DataPart,
        DataSettings,
        EndpointSettings,
        FinetuneSettings,
        ModelSettings,
        PlanSettings,
        PromptSet,
        RepairSettings,
        ScoreSettings,
        Settings,
        SpectrumSettings,
    )

__version__ = "0.1.0"

_OF_API = ("export", "finetune", "plan", "repair", "score", "settings_for")
_OF_SETTINGS = (
    "DataPart", "DataSettings", "EndpointSettings", "FinetuneSettings", "ModelSettings", "PlanSettings", "PromptSet",
    "RepairSettings", "ScoreSettings", "Settings", "SpectrumSettings",
)  # fmt: skip
_HOMES = (
    dict.fromkeys(_OF_API, "oneshot.api")
    | dict.fromkeys(("Finetuned", "Repair", "Scores", "Watched"), "oneshot.results")
    | dict.fromkeys(_OF_SETTINGS, "oneshot.settings")
    | {"Exported": "oneshot.report.exports", "Plan": "oneshot.planning.plan", "UserError": "oneshot.errors"}
)

__all__ = [
    "DataPart", "DataSettings", "EndpointSettings", "Exported", "FinetuneSettings", "Finetuned", "ModelSettings",
    "Plan", "PlanSettings", "PromptSet", "Repair", "RepairSettings", "ScoreSettings", "Scores", "Settings",
    "SpectrumSettings", "UserError", "Watched", "__version__", "export", "finetune", "plan", "repair", "score",
    "settings_for",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'oneshot' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Package(types.ModuleType):
    """The package, whose functions keep their names where a stage's module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
