"""Every setting of every stage, as frozen dataclasses that check themselves when they are made.

One file describes a run (``--config launch/runs/llama3-70b.yaml``); each stage reads its own sections. Sharding and
offload are not here: the DeepSpeed JSON in ``ds_configs/`` owns them. What reads files and command lines is
``oneshot.commandline``.
"""

from oneshot.settings.data import DataPart, DataSettings
from oneshot.settings.model import ModelSettings
from oneshot.settings.plan import PlanSettings, SpectrumSettings
from oneshot.settings.run import Rule, Settings, as_text, to_dict, write
from oneshot.settings.same import differences, read
from oneshot.settings.score import EndpointSettings, PromptSet, ScoreSettings
from oneshot.settings.training import FinetuneSettings, RepairSettings, rate_for

__all__ = [
    "DataPart",
    "DataSettings",
    "EndpointSettings",
    "FinetuneSettings",
    "ModelSettings",
    "PlanSettings",
    "PromptSet",
    "RepairSettings",
    "Rule",
    "ScoreSettings",
    "Settings",
    "SpectrumSettings",
    "as_text",
    "differences",
    "rate_for",
    "read",
    "to_dict",
    "write",
]
