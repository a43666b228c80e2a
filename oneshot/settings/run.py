"""The settings of a run: all sections, and what no section owns."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oneshot.errors import UserError
from oneshot.redact import without_secrets
from oneshot.settings.checks import check_fields, refuse_blank
from oneshot.settings.data import DataSettings
from oneshot.settings.kinds import CountFloat, PositiveInt
from oneshot.settings.model import ModelSettings
from oneshot.settings.plan import PlanSettings, SpectrumSettings
from oneshot.settings.score import ScoreSettings
from oneshot.settings.training import FinetuneSettings, RepairSettings
from oneshot.whole import write_whole

Rule = Literal["bilevel", "alignment", "random", "hardest"]


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        out: run folder; none takes a new one under runs/
        name: what the run is called in report and run folder; none: after the model
        example: JSONL or JSON file with the one safety example; none takes one from the pool
        pool: JSONL file of candidate examples; none: the shipped pool
        select: rule by which a candidate becomes the example: bilevel (of the best by alignment the one whose repair
            leaves the model closest to the aligned one on requests to refuse, and to itself on the guard's prompts),
            alignment (whose gradient points where that distance falls), random, hardest (the least likely refusal), or
            the ID of one
        shortlist: how many candidates bilevel repairs with
        guard: JSONL file of unlabelled prompts whose answers must not move; none: the shipped harmless prompts
        watch_prompts: JSONL file of unlabelled prompts that the watch looks at, to be answered as before, or, with kind
            should_refuse, to be refused; none: the shipped ones and some of the guard's file
        reference: the aligned checkpoint from which the model was fine-tuned
        reference_revision: branch, tag or commit of the reference, where that is a Hub id
        finetune_first: first fine-tune the model as data and finetune say, then repair (or look at) the result, with
            that model as the reference
        seed: seed of data order and initialization
        preflight: look at machines, shared folder, disk and network before anything is read; auto: on several machines
        hang_minutes: end a rank that has not moved for so long, with its stacks in the log; 0 for never
        resume: go on with the run in the folder --out: a fine-tune from its last saved state, a repair from its start;
            with nothing there yet, start
        log_with: also send the run's figures to tensorboard, wandb or trackio, whichever is installed
        delete_degraded: remove the safety-degraded checkpoint that this run itself makes, once it has been measured;
            never one that is given
        offline: fetch nothing, neither models nor data sets nor packages; what is in the caches is used
        push_to_hub: OWNER/NAME of a private repository on the Hub that takes the patch and the report once the repair
            is finished (a repaired checkpoint: OWNER/NAME-repaired); oneshot push does it later
        push_public: make that repository public
        push_degraded: push also what is marked as safety-degraded; never to a public repository
        require: end with exit code 4 unless this is the outcome of the repair, without doubts
        profile: write and print a table of where the time goes: by phase seconds, tokens per second, bytes and peaks
        debug: full tracebacks
        model: the model to work on
        data: what the harmful fine-tune trains on
        finetune: the harmful fine-tune
        repair: the one-shot repair
        score: what is measured
        spectrum: what ``oneshot spectrum`` measures
        plan: what ``oneshot plan`` reckons with
    """

    out: str | None = None
    name: str | None = None
    example: str | None = None
    pool: str | None = None
    select: str = "bilevel"
    shortlist: PositiveInt = 4
    guard: str | None = None
    watch_prompts: str | None = None
    reference: str | None = None
    reference_revision: str | None = None
    finetune_first: bool = False
    seed: int = 0
    preflight: Literal["auto", "always", "never"] = "auto"
    hang_minutes: CountFloat = 60.0
    resume: bool = False
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    delete_degraded: bool = False
    offline: bool = False
    push_to_hub: str | None = None
    push_public: bool = False
    push_degraded: bool = False
    require: Literal["repaired"] | None = None
    profile: bool = False
    debug: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    spectrum: SpectrumSettings = field(default_factory=SpectrumSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)

    @property
    def called(self) -> str:
        """What the run is called: as ``name`` says, else after its model."""
        return self.name or str(self.model.path)

    def __post_init__(self) -> None:
        check_fields(self, "")
        refuse_blank({"out": self.out, "reference": self.reference})
        if self.out is not None:  # no shell has done it behind --out=, in a file and in Python
            object.__setattr__(self, "out", os.path.expanduser(self.out))
        if self.resume and self.out is None:
            raise UserError("Setting resume needs --out, the run folder to go on in.")


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain nested dictionaries (for YAML and JSON), without keys and tokens."""
    plain: dict[str, Any] = without_secrets(dataclasses.asdict(settings))
    return plain


def write(settings: Settings, path: Path) -> None:
    """Write the resolved settings, whole or not at all, as YAML that ``--config`` reads back."""
    write_whole(path, as_text(settings))


def as_text(settings: Settings) -> str:
    """Return the settings as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(settings), sort_keys=False)
